#!/usr/bin/env python
"""Preflight of a long pretraining run: its command line, on its machines, in a few minutes.

    python scripts/preflight.py [flags of main_moco.py] DIR
    torchrun --nproc-per-node 8 scripts/preflight.py [flags of main_moco.py] DIR

One table, go or NO-GO on each line: some images judged as `scripts/check_dataset.py` judges all of
them; memory of a full step; collectives; loading against what the steps need; saving; a run of ten
steps that is killed and resumed; a forecast of the hours, what limits them, what twice as many
devices would bring, and how far a short run is from the forecast. Nothing is left on disk. Exit
status 1 where a line says NO-GO.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.cli import pretrain_config  # noqa: E402
from moco.errors import report_user_errors  # noqa: E402
from moco.tasks.moco import MoCoTask  # noqa: E402
from moco.train.preflight import preflight  # noqa: E402
from moco.train.verdicts import table  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    config = pretrain_config(argv)
    with report_user_errors():
        lines = preflight(config, MoCoTask)
    print(table(lines), flush=True)
    return int(not all(line.go for line in lines))


if __name__ == "__main__":
    sys.exit(main())
