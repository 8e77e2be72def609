#!/usr/bin/env bash
# The paper's Figure 3 on CIFAR-10: random, supervised and contrastive encoders of two dimensions.
#
#     bash scripts/circle.sh DIR         DIR/{train,val}/CLASS/IMAGE; docs/cifar10_circle.png is its result
#
# A ResNet-8 of width 32 with a stride-2 stem, 500 images per class:
# - contrastive: 50 epochs of 1 * align(2) + 2 * uniform(2);
# - supervised: 12 epochs of cross-entropy of both views, a linear classifier on the features;
# - random: no learning, but one epoch that gives batch norm its statistics.
# Half an hour on one core of a machine that is busy with other things (1216, 848 and 52 s). What has
# been finished in $OUT is not run again.
set -euo pipefail
. "$(dirname "$0")/launch.sh"
DATA=${1:?usage: [OUT=FOLDER] [EPOCHS=N] bash scripts/circle.sh DIR}
OUT=${OUT:-results/circle}
EPOCHS=${EPOCHS:-50}
IMAGES=${IMAGES:-500}     # per class, to train on
SHOWN=${SHOWN:-300}       # per class, of val/, in the picture
CLASSES=${CLASSES:-airplane automobile cat}
mkdir -p "$OUT"

common=(-a resnet8x2s2 --images-per-class "$IMAGES" --batch-size 128 --seed 0 --image-size 32
        --crop-scale 0.2 1 --mean 0.4914 0.4822 0.4465 --std 0.2023 0.1994 0.2010
        --knn-every 0 --resume auto)
moco=("$PYTHON" "$ROOT/main_moco.py" "${common[@]}" --aug-plus --no-blur
      --moco-dim 2 --moco-k 1024 --moco-m 0.99 --bn-splits 1)

contrastive=$OUT/contrastive/checkpoint_$(printf %04d $((EPOCHS - 1))).pth.tar
[ -f "$contrastive" ] || "${moco[@]}" --epochs "$EPOCHS" --lr 0.06 --wd 5e-4 --cos \
    --moco-align-w 1 --moco-align-alpha 2 --moco-unif-w 2 --moco-unif-t 2 \
    --save-dir "$OUT/contrastive" "$DATA"
random=$OUT/random/checkpoint_0000.pth.tar
[ -f "$random" ] || "${moco[@]}" --epochs 1 --lr 1e-9 --save-dir "$OUT/random" "$DATA"
supervised=$OUT/supervised/checkpoint_$(printf %04d $((EPOCHS / 4 - 1))).pth.tar
[ -f "$supervised" ] || "$PYTHON" "$ROOT/scripts/train_in_batch.py" "${common[@]}" --supervised --dim 2 \
    --epochs $((EPOCHS / 4)) --lr 0.06 --wd 5e-4 --cos --save-dir "$OUT/supervised" "$DATA"

for name in random supervised contrastive; do
    "$PYTHON" "$ROOT/scripts/extract_features.py" "${!name}" "$DATA" "$OUT/$name.npz" --overwrite \
        --layer projection --normalize --views 2 --images-per-class "$SHOWN"
done
"$PYTHON" "$ROOT/scripts/plot_features.py" 3 "$OUT"/{random,supervised,contrastive}.npz \
    --classes $CLASSES --out "$OUT/circle.png"
# With 256 colours it has half of the bytes.
"$PYTHON" -c 'import sys; from PIL import Image; Image.open(sys.argv[1]).convert("RGB").quantize(
    256, dither=Image.Dither.NONE).save(sys.argv[1], optimize=True)' "$OUT/circle.png"
