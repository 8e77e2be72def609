"""The command line of train_in_batch.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from moco.cli.folders import check_data_folder, training_folder
from moco.cli.options import make_parts, parser_of, refusals, settle
from moco.cli.pretrain import checked
from moco.cli.replay import replayed_config
from moco.config import DATASET_DEFAULTS, InBatchConfig, auto_rate, objective_slug


def in_batch_config(argv: Sequence[str] | None = None) -> InBatchConfig:
    """The config that a command line of train_in_batch.py describes; else exit status 2."""
    if config := replayed_config(argv, InBatchConfig, _check_data):
        return config
    parser = parser_of(InBatchConfig)
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
