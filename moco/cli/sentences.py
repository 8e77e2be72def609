"""The command line of train_sentences.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moco.cli.folders import training_folder
from moco.cli.options import make_parts, parser_of, refusals, settle
from moco.cli.replay import replayed_config
from moco.config import SentenceConfig


def sentence_config(argv: Sequence[str] | None = None) -> SentenceConfig:
    """The config that a command line of train_sentences.py describes; else exit status 2."""
    if config := replayed_config(argv, SentenceConfig, _check_text):
        return config
    parser = parser_of(SentenceConfig)
    options = parser.parse_args(argv)
    with refusals(parser):
        config = SentenceConfig(**settle(make_parts(options, SentenceConfig)))
    _check_text(parser, config)
    name = f"sentences-{config.objective.slug()}"
    return replace(config, saving=training_folder(parser, config, name))


def _check_text(parser: argparse.ArgumentParser, config: SentenceConfig) -> None:
    text = Path(config.data.data)
    if not text.is_file():
        parser.error(
            f"{text} is a folder, expected a text file"
            if text.is_dir()
            else f"no such text: {text}"
        )
