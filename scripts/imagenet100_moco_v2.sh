#!/usr/bin/env bash
# ImageNet-100, ResNet-50, 200 epochs, MoCo v2: InfoNCE with temperature 0.2.
#
# Expected: 77.54 % linear top-1 (scripts/imagenet_lincls.sh), one run, last epoch; source: README of
# github.com/SsnL/moco_align_uniform. Batch and learning rate move this by up to 10 points: keep them.
# Hardware and hours are not published. Make DIR with scripts/create_imagenet_subset.py.
# Not run by us yet.
#
#     bash scripts/imagenet100_moco_v2.sh DIR [MORE FLAGS OF main_moco.py ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
pretrain -a resnet50 --epochs 200 --batch-size 128 --lr 0.03 --aug-plus --mlp --cos \
    --moco-t 0.2 -- "$@"
