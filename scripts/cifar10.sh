#!/usr/bin/env bash
# CIFAR-10 on one device: pretraining, k-NN and linear evaluation, alignment and uniformity.
#
#     bash scripts/cifar10.sh DIR                      200 epochs of a ResNet-18: for a GPU
#     OBJECTIVE=infonce bash scripts/cifar10.sh DIR
#     ARCH=resnet8x2s2 IMAGES=1000 EPOCHS=20 PROBE_EPOCHS=10 bash scripts/cifar10.sh DIR     for a CPU
#
# DIR has train/CLASS/IMAGE and val/CLASS/IMAGE, or torchvision's cifar-10-batches-py. What has been
# finished in $OUT is not run again.
#
# The recipe of MoCo's published CIFAR-10 demo (branch colab-notebook of github.com/facebookresearch/
# moco): ResNet-18 with the small-image stem, batch 512, lr 0.06 cosine, weight decay 5e-4, K 4096,
# m 0.99, dimension 128 without MLP head, 8 batch-norm groups, asymmetric loss, views without blur.
# Expected of OBJECTIVE=infonce at 200 epochs: k-NN 82.6 % (k 200, temperature 0.1, on the normalised
# 128-dimensional output; same source). Nobody has published align + uniform by this recipe.
# Only the original pixels are comparable with that figure; JPEG copies of CIFAR-10 are not.
set -euo pipefail
. "$(dirname "$0")/launch.sh"
DATA=${1:?usage: [OBJECTIVE=align_uniform|infonce|random] [EPOCHS=N] ... bash scripts/cifar10.sh DIR}
OBJECTIVE=${OBJECTIVE:-align_uniform}     # or infonce, or random: an untrained encoder
ARCH=${ARCH:-resnet18}                    # torchvision's ResNets get the small-image stem
EPOCHS=${EPOCHS:-200}
PROBE_EPOCHS=${PROBE_EPOCHS:-100}         # of the linear classifier; drops at 60 % and 80 %
IMAGES=${IMAGES:-}                        # images per class, for training and evaluation; all
SEED=${SEED:-0}
OUT=${OUT:-results/cifar10-$OBJECTIVE-$ARCH-e$EPOCHS${IMAGES:+-n$IMAGES}-s$SEED}

case $OBJECTIVE in
    align_uniform) terms=(--moco-align-w 3 --moco-align-alpha 2 --moco-unif-w 1 --moco-unif-t 3) ;;
    infonce) terms=(--moco-t 0.1) ;;
    random) terms=(--max-steps 0) ;;
    *) echo "error: OBJECTIVE must be align_uniform, infonce or random, got $OBJECTIVE" >&2; exit 2 ;;
esac
case $ARCH in
    resnet18 | resnet34 | resnet50) encoder=(-a "$ARCH" --small-stem) ;;
    *) encoder=(-a "$ARCH") ;;
esac
data=(--dataset folder)
[ -d "$DATA/cifar-10-batches-py" ] && data=(--dataset cifar10)
[ -n "$IMAGES" ] && data+=(--images-per-class "$IMAGES")

checkpoint=$OUT/pretrain/checkpoint_$(printf %04d $((EPOCHS - 1))).pth.tar
[ "$OBJECTIVE" = random ] && checkpoint=$OUT/pretrain/step_00000000.pth.tar
start=$SECONDS
if [ ! -f "$checkpoint" ]; then
    "$PYTHON" "$ROOT/main_moco.py" "${encoder[@]}" "${terms[@]}" "${data[@]}" \
        --epochs "$EPOCHS" --batch-size 512 --lr 0.06 --wd 5e-4 --cos \
        --moco-k 4096 --moco-m 0.99 --moco-dim 128 --bn-splits 8 \
        --image-size 32 --aug-plus --no-blur --crop-scale 0.08 1 \
        --mean 0.4914 0.4822 0.4465 --std 0.2023 0.1994 0.2010 \
        --seed "$SEED" --save-dir "$OUT/pretrain" --resume auto "$DATA"
fi
echo "pretraining: $((SECONDS - start)) s"
start=$SECONDS
PROBE=$OUT/lincls-e$PROBE_EPOCHS
if [ ! -f "$PROBE/lincls.json" ]; then
    "$PYTHON" "$ROOT/main_lincls.py" --pretrained "$checkpoint" "${data[@]}" \
        --epochs "$PROBE_EPOCHS" --schedule $((PROBE_EPOCHS * 6 / 10)) $((PROBE_EPOCHS * 8 / 10)) \
        --knn --knn-k 200 --knn-t 0.1 --knn-layer projection \
        --seed "$SEED" --save-dir "$PROBE" --resume auto "$DATA"
fi
if [ ! -f "$OUT/align_uniform.json" ]; then
    "$PYTHON" "$ROOT/scripts/measure_align_uniform.py" "$checkpoint" "$DATA" "${data[@]}" \
        --out "$OUT/align_uniform.json"
fi
echo "evaluation: $((SECONDS - start)) s; $PROBE/lincls.json and $OUT/align_uniform.json"
