"""Momentum Contrast (He et al. 2020; Chen et al. 2020) with the alignment + uniformity objective.

docs/design.md has the floors of the house and the order in which to read it: `builder` is the MoCo
step, `train.loop` the training loop, `evaluate.evaluation` the linear evaluation.
"""
