#!/usr/bin/env bash
# ImageNet-100, ResNet-50, 200 epochs, 3 * align(alpha=2) + 1 * uniform(t=3).
#
# Expected: 77.66 % linear top-1 (scripts/imagenet_lincls.sh), one run, last epoch; source: README of
# github.com/SsnL/moco_align_uniform. Batch and learning rate move this by up to 10 points: keep them.
# Hardware and hours are not published. Make DIR with scripts/create_imagenet_subset.py.
# Not run by us yet.
#
#     bash scripts/imagenet100_align_uniform.sh DIR [MORE FLAGS OF main_moco.py ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
pretrain -a resnet50 --epochs 200 --batch-size 128 --lr 0.03 --aug-plus --mlp --cos \
    --moco-align-w 3 --moco-align-alpha 2 --moco-unif-w 1 --moco-unif-t 3 -- "$@"
