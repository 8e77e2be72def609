"""--replay RUN/failed: the command line that reruns one step of a training, of any command."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moco.checkpoint import read_checkpoint
from moco.cli.options import COMMANDS, add_options, make_parts, refusals
from moco.cli.parser import Parser, folder, non_empty
from moco.config import (
    InBatchConfig,
    Launch,
    PretrainConfig,
    SentenceConfig,
    config_of,
    from_flat,
    parts_of,
)
from moco.errors import CheckpointError
from moco.launch import place
from moco.run_files import FAILED_STATE

Config = TypeVar("Config", PretrainConfig, InBatchConfig, SentenceConfig)


@dataclass(frozen=True)
class _Here:
    """What the command line of a replay says anew of a config."""

    launch: Launch


# What a replay does without, whatever the run did.
_LEFT_OUT = {"resume": None, "init_from": None, "knn_every": 0, "profile": False, "compile": False}


def replayed_config(
    argv: Sequence[str] | None,
    config_type: type[Config],
    check_data: Callable[[argparse.ArgumentParser, Config], None],
) -> Config | None:
    """The config of the run that a black box is of, to rerun one step of it here; None where the
    command line has no --replay.

    Args:
        config_type: of the command's task.
        check_data: refuses data that the config cannot train on.
    """
    argv = sys.argv[1:] if argv is None else argv
    if all(word.partition("=")[0] != "--replay" for word in argv):
        return None
    parser = Parser(description="rerun the step that a run's black box holds", allow_abbrev=False)
    parser.add_argument("--replay", required=True, type=folder, metavar="RUN/failed")
    parser.add_argument("data", nargs="?", type=non_empty, metavar="DIR", help="if it has moved")
    parser.add_argument("-j", "--workers", type=int, default=0, metavar="N")
    add_options(parser, _Here)
    options = parser.parse_args(argv)
    state = options.replay / FAILED_STATE
    try:
        saved = read_checkpoint(state, failed=True)
        about, flat = saved["failed"], saved["args"]
    except (FileNotFoundError, CheckpointError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        parser.error(
            f"--replay: expected RUN/failed, which a run leaves when a step fails: {reason}"
        )
    if config_of(flat) is not config_type:
        program = COMMANDS[config_of(flat)][0]
        parser.error(f"{options.replay} is of {program}, which reruns its step")
    flat = {**flat, **_LEFT_OUT, "workers": options.workers, "seed_given": True}
    flat |= {"data": options.data or flat["data"], "replay": str(options.replay)}
    flat |= {"checkpoint": str(state), "max_steps": about["step"] + 1}
    flat["save_dir"] = f"{tempfile.gettempdir()}/replay-{secrets.token_hex(4)}"
    with refusals(parser):
        launch = make_parts(options, _Here)["launch"]
        parts = {name: from_flat(part, flat) for name, part in parts_of(config_type).items()}
        config = config_type(**{**parts, "launch": launch, "placement": place(launch)})
    check_data(parser, config)
    return config
