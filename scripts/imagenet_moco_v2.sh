#!/usr/bin/env bash
# ImageNet-1k, ResNet-50, 200 epochs, MoCo v2: InfoNCE with temperature 0.2.
#
# Expected: 67.5 +- 0.1 % linear top-1 (scripts/imagenet_lincls.sh) over 5 runs (67.7 67.6 67.4 67.6
# 67.3), in 53 h on 8 V100; source: README of github.com/facebookresearch/moco. Not run by us yet.
#
#     bash scripts/imagenet_moco_v2.sh DIR [MORE FLAGS OF main_moco.py ...]
set -euo pipefail
. "$(dirname "$0")/launch.sh"
pretrain -a resnet50 --epochs 200 --batch-size 256 --lr 0.03 --aug-plus --mlp --cos \
    --moco-t 0.2 -- "$@"
