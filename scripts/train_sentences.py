#!/usr/bin/env python
"""Train two sentence encoders by Quick-Thought: neighbours in a text are positives.

    python scripts/train_sentences.py TEXT.txt[.xz|.gz]
    python scripts/train_sentences.py TEXT --contr-w 0 --align-w 0.9 --unif-w 0.1 --unif-t 5
    python scripts/train_sentences.py TEXT --no-normalize            the original loss

TEXT has one sentence a line, in order, and a blank line between documents. The objective is
contr_w * contrastive(tau) + align_w * align(alpha) + unif_w * uniform(t), by default the
contrastive loss with tau 0.075 (arXiv:2005.10242, section 5 and appendix B.3).
`evaluate_sentences.py` evaluates the checkpoints.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.cli import sentence_config
from moco.launch import launch_config
from moco.tasks.sentences import SentenceTask
from moco.train.loop import train


def main(argv: Sequence[str] | None = None) -> None:
    launch_config(functools.partial(train, task=SentenceTask), sentence_config(argv))


if __name__ == "__main__":
    main()
