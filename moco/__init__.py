"""Momentum Contrast (He et al. 2020; Chen et al. 2020) with the alignment + uniformity objective.

Reading order: builder (the algorithm), encoders, distributed, images, views, loader, schedule,
evaluate; then what makes a run of it: checkpoint, run, guards, log, and options, the flags that
both mains share.
"""
