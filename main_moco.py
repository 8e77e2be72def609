#!/usr/bin/env python
"""Pretrain an encoder with MoCo and the alignment + uniformity objective.

    python main_moco.py DIR                              all visible GPUs, else the CPU
    torchrun --nproc-per-node 8 main_moco.py DIR         one process per GPU, started by torchrun
    python main_moco.py --replay RUN/failed              rerun the step that went wrong, and look
    python main_moco.py -a resnet50 --lr 0.03 --batch-size 256 --mlp --aug-plus --cos \\
        --dist-url tcp://HOST:10001 --multiprocessing-distributed --world-size 2 --rank 0 DIR

DIR has `train/CLASS/IMAGE` as ImageNet does, or is any folder with images. The default objective is
3 * align(alpha=2) + 1 * uniform(t=3); `--moco-t TAU` selects upstream MoCo's InfoNCE instead.

The command line becomes a config (`moco.cli`, `moco.config`), which every process trains by:
`moco.train.loop` is the loop, `moco.tasks.moco` says what MoCo is to it, and `moco.builder` is the
MoCo step itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from moco.cli import pretrain_config
from moco.launch import launch_config
from moco.tasks.moco import MoCoTask
from moco.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    launch_config(functools.partial(train, task=MoCoTask), pretrain_config(argv))


if __name__ == "__main__":
    main()
