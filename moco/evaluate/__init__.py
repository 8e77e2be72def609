"""Evaluation of encoders: k-NN, linear classifiers, fine-tuning, alignment and uniformity."""
