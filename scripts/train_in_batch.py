#!/usr/bin/env python
"""Train an encoder by alignment, uniformity and InfoNCE within the batch: no queue, no key encoder.

    python scripts/train_in_batch.py --dataset stl10 DIR            the paper's STL-10 setting
    python scripts/train_in_batch.py --dataset cifar10 --dim 2 --contr-w 1 --contr-tau 0.5 \\
        --align-w 0 --unif-w 0 --batch-size 256 DIR                 CIFAR-10 on the circle
    python scripts/train_in_batch.py --dataset nyu DIR              NYU, for evaluate_depth.py
    python scripts/train_in_batch.py --supervised DIR               a classifier, to compare with
    torchrun --nproc-per-node 4 scripts/train_in_batch.py DIR       several processes, one batch

Both views of a batch go through one encoder in one forward pass. The default objective is
1 * align(alpha=2) + 1 * uniform(t=2, mean of both views); terms of weight 0 are logged as well.
With --max-steps 0 the untrained encoder is saved, its batch norm with statistics of the data. The
run folder, --resume auto and all else are as in main_moco.py.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.cli import in_batch_config
from moco.launch import launch_config
from moco.tasks.in_batch import InBatchTask
from moco.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    launch_config(functools.partial(train, task=InBatchTask), in_batch_config(argv))


if __name__ == "__main__":
    main()
