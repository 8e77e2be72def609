"""The command line of train_in_batch.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from moco.cli.folders import check_data_folder, training_folder
from moco.cli.options import add_options, make_parts, refusals, settle
from moco.cli.parser import Parser
from moco.cli.pretrain import checked
from moco.cli.replay import replayed_config
from moco.config import (
    DATASET_DEFAULTS,
    IN_BATCH_DEFAULTS,
    InBatchConfig,
    auto_rate,
    objective_slug,
)


def in_batch_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="training within the batch: one encoder, both views, no queue",
        allow_abbrev=False,
    )
    add_options(parser, InBatchConfig)
    parser.set_defaults(**IN_BATCH_DEFAULTS)
    return parser


def in_batch_config(argv: Sequence[str] | None = None) -> InBatchConfig:
    """The config that a command line of train_in_batch.py describes; else exit status 2."""
    if config := replayed_config(argv, InBatchConfig, _check_data):
        return config
    parser = in_batch_parser()
    options = parser.parse_args(argv)
    parser.set_defaults(**DATASET_DEFAULTS.get(options.dataset, {}))
    options = parser.parse_args(argv)  # again, with the defaults of the data set
    with refusals(parser):
        parts = settle(make_parts(options, InBatchConfig))
        if parts["optim"].lr is None:
            parts["optim"] = replace(parts["optim"], lr=auto_rate(parts["optim"].batch_size))
        config = InBatchConfig(**parts)
        config = checked(config, config.encoder.dim)
    _check_data(parser, config)
    objective = "supervised" if config.objective.supervised else objective_slug(config.objective)
    name = f"inbatch-{config.encoder.arch}-{objective}"
    return replace(config, saving=training_folder(parser, config, name))


def _check_data(parser: argparse.ArgumentParser, config: InBatchConfig) -> None:
    split = "train" if config.objective.supervised else "pretrain"
    check_data_folder(parser, config.data, {split: config.optim.batch_size})
