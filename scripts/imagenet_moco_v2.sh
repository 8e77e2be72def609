#!/usr/bin/env bash
# ImageNet-1k, ResNet-50, 200 epochs, MoCo v2: InfoNCE with temperature 0.2.
#
# Expected: 67.5 +- 0.1 % linear top-1 (scripts/imagenet_lincls.sh) over 5 runs (67.7 67.6 67.4 67.6
# 67.3), in 53 h on 8 V100; source: README of github.com/facebookresearch/moco. Not run by us yet.
#
#     bash scripts/imagenet_moco_v2.sh DIR [MORE FLAGS OF main_moco.py ...]
#
# Uses all visible GPUs of this node. Cut off and started again it goes on from its last checkpoint.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
DATA=${1:?usage: bash scripts/imagenet_moco_v2.sh DIR [MORE FLAGS ...]}
shift
[ -x "$ROOT/.venv/bin/python" ] && PYTHON=${PYTHON:-$ROOT/.venv/bin/python}
exec "${PYTHON:-python3}" "$ROOT/main_moco.py" -a resnet50 \
    --epochs 200 --batch-size 256 --lr 0.03 --aug-plus --mlp --cos \
    --moco-t 0.2 \
    --save-dir "${OUT:-results/imagenet_moco_v2}" --resume auto "$@" "$DATA"
