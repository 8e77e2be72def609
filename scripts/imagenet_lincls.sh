#!/usr/bin/env bash
# Linear evaluation as published for ImageNet and ImageNet-100: 100 epochs, batch 256, lr 30.
#
#     bash scripts/imagenet_lincls.sh CHECKPOINT DIR [MORE FLAGS OF main_lincls.py ...]
#
# Expected top-1 by what was pretrained (sources in the heads of those scripts):
#     imagenet_align_uniform.sh     67.69          imagenet_moco_v2.sh       67.5 +- 0.1
#     imagenet100_align_uniform.sh  77.66          imagenet100_moco_v2.sh    77.54
# Hours: 8 to 12 expected on 8 GPUs of 2020 (He, github.com/facebookresearch/moco, issue 5).
# Both best and last accuracy are in RUN/lincls.json; the published figures are of the last epoch
# (author, github.com/SsnL/moco_align_uniform, issue 2). Not run by us yet.
set -euo pipefail
. "$(dirname "$0")/launch.sh"
USAGE="usage: bash scripts/imagenet_lincls.sh CHECKPOINT DIR [MORE FLAGS ...]"
CHECKPOINT=${1:?$USAGE}
DATA=${2:?$USAGE}
shift 2
exec "$PYTHON" "$ROOT/main_lincls.py" \
    --epochs 100 --batch-size 256 --lr 30 --wd 0 --schedule 60 80 \
    --pretrained "$CHECKPOINT" "$@" "$DATA"
