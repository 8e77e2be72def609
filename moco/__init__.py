"""Momentum Contrast (He et al. 2020; Chen et al. 2020) with the alignment + uniformity objective.

Reading order: builder (the algorithm), encoders, distributed, loader, schedule, checkpoint,
evaluate, log. Nothing here knows the command line; that is main_moco.py and main_lincls.py.
"""
