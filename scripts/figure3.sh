#!/usr/bin/env bash
# The paper's Figure 3 in its own setting: random, supervised and contrastive encoders of two
# dimensions on CIFAR-10, small_alexnet, trained within the batch (arXiv:2005.10242, section 4.2).
#
#     bash scripts/figure3.sh DIR                torchvision's files, or DIR/{train,val}/CLASS/IMAGE
#     ARCH=small_alexnetx0.125 EPOCHS=20 IMAGES=500 bash scripts/figure3.sh DIR      on a CPU
#
# - contrastive: InfoNCE within a batch of 256 (255 negatives), temperature 0.5;
# - supervised: cross-entropy of a linear classifier on the unit output;
# - random: no learning, but batch norm has statistics.
# Then the linear accuracy of each output by the paper's protocol, and the picture. What has been
# finished in $OUT is not run again. The paper does not say whether its 256 are negatives or images.
set -euo pipefail
. "$(dirname "$0")/launch.sh"
DATA=${1:?usage: [OUT=FOLDER] [ARCH=NAME] [EPOCHS=N] [IMAGES=N] bash scripts/figure3.sh DIR}
OUT=${OUT:-results/figure3}
ARCH=${ARCH:-small_alexnet}
EPOCHS=${EPOCHS:-200}
BATCH=${BATCH:-256}
IMAGES=${IMAGES:-5000}    # per class, to train on
SHOWN=${SHOWN:-300}       # per class, of val/, in the picture
CLASSES=${CLASSES:-airplane automobile cat ship}
mkdir -p "$OUT"

data=(--dataset cifar10 --images-per-class "$IMAGES" --seed 0)
train=("$PYTHON" "$ROOT/scripts/train_in_batch.py" "${data[@]}" -a "$ARCH" --dim 2
       --batch-size "$BATCH" --epochs "$EPOCHS"
       --schedule $((EPOCHS * 155 / 200)) $((EPOCHS * 170 / 200)) $((EPOCHS * 185 / 200))
       --mean 0.4914 0.4822 0.4465 --std 0.2470 0.2435 0.2616 --knn-every 0 --resume auto)
"${train[@]}" --max-steps 0 --save-dir "$OUT/random" "$DATA"
"${train[@]}" --supervised --save-dir "$OUT/supervised" "$DATA"
"${train[@]}" --contr-w 1 --contr-tau 0.5 --align-w 0 --unif-w 0 --save-dir "$OUT/contrastive" "$DATA"

for name in random supervised contrastive; do
    "$PYTHON" "$ROOT/main_lincls.py" --protocol stl10 --layer output "${data[@]}" \
        --batch-size "$((BATCH < 128 ? BATCH : 128))" --pretrained "$OUT/$name" \
        ${PROBE:-} --save-dir "$OUT/$name-output" --resume auto "$DATA"
    file=$(ls "$OUT/$name"/*.pth.tar | tail -n 1)
    "$PYTHON" "$ROOT/scripts/extract_features.py" "$file" "$DATA" "$OUT/$name.npz" --overwrite \
        --layer projection --normalize --views 2 --images-per-class "$SHOWN"
done
"$PYTHON" "$ROOT/scripts/plot_features.py" 3 "$OUT"/{random,supervised,contrastive}.npz \
    --classes $CLASSES --out "$OUT/figure3.png"
