#!/usr/bin/env bash
# ImageNet-1k, ResNet-50, 200 epochs, 3 * align(alpha=2) + 1 * uniform(t=3).
#
# Expected: 67.69 % linear top-1 (scripts/imagenet_lincls.sh), one run; source: README of
# github.com/SsnL/moco_align_uniform, by the flags below. (The appendix of arXiv:2005.10242, B.2.2,
# says steps at epochs 120 and 160 instead of --cos; the README of the code is followed here.)
# Five runs of MoCo v2 span 0.4 points, so judge a run of your own with that margin.
# Hardware and hours: the number of GPUs of that run is not published; MoCo v2 of the same size took
# 53 h on 8 V100 (README of github.com/facebookresearch/moco). Not run by us yet.
#
#     bash scripts/imagenet_align_uniform.sh DIR [MORE FLAGS OF main_moco.py ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
pretrain -a resnet50 --epochs 200 --batch-size 256 --lr 0.03 --aug-plus --mlp --cos \
    --moco-align-w 3 --moco-align-alpha 2 --moco-unif-w 1 --moco-unif-t 3 -- "$@"
