#!/usr/bin/env python
"""Linear evaluation, k-NN and fine-tuning of a pretrained encoder.

    python main_lincls.py --pretrained RUN/checkpoint_0199.pth.tar DIR
    python main_lincls.py --pretrained RUN/checkpoint_0199.pth.tar --knn --epochs 0 DIR    k-NN only
    python main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained FILE \\
        --multiprocessing-distributed --world-size 1 --rank 0 DIR
    python main_lincls.py -e --pretrained RUN/model_best.pth.tar DIR      a saved classifier, again
    python main_lincls.py --lr 1,3,10,30 --folds 3 --pretrained FILE DIR     chosen without val/
    python main_lincls.py --cached --lr 1,3,10,30 --wd 0,1e-4 --pretrained FILE DIR
    python main_lincls.py --finetune --labels 1 --pretrained FILE DIR     whole network, 1 % labels

DIR has `train/CLASS/IMAGE` and `val/CLASS/IMAGE`. Architecture, stem, image size, mean and standard
deviation come from the checkpoint. The standard protocol is upstream MoCo's: SGD with lr 30 and no
weight decay, batch 256, 100 epochs, x0.1 at 60 and 80, random resized crop and flip, centre-crop
validation, batch norm in eval mode. Accuracies lie in RUN/lincls.json, best and last.
"""

from __future__ import annotations

from collections.abc import Sequence

from moco import cli
from moco.evaluate.evaluation import evaluate
from moco.launch import launch_config


def main(argv: Sequence[str] | None = None) -> None:
    launch_config(evaluate, cli.lincls_config(argv))


if __name__ == "__main__":
    main()
