"""The command line of main_moco.py, with --preset."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from moco import encoders
from moco.cli.folders import check_data_folder, training_folder
from moco.cli.options import make_parts, parser_of, refusals, settle
from moco.cli.replay import replayed_config
from moco.config import CHOSEN, InBatchConfig, PretrainConfig, objective_slug, small_preset
from moco.data.images import open_images, typical_side
from moco.errors import DataError
from moco.precision import channels_last_helps

Config = TypeVar("Config", PretrainConfig, InBatchConfig)


def pretrain_config(argv: Sequence[str] | None = None) -> PretrainConfig:
    """The config that a command line of main_moco.py describes; else exit status 2."""
    if config := replayed_config(argv, PretrainConfig, _check_data):
        return config
    parser = parser_of(PretrainConfig)
    options = parser.parse_args(argv)
    chosen = ""
    if options.preset:
        options, chosen = _with_preset(parser, options, argv)
    with refusals(parser):
        parts = make_parts(options, PretrainConfig)
        parts["preset"] = replace(parts["preset"], chosen=chosen)
        config = PretrainConfig(**settle(parts))
        config = checked(config, config.encoder.moco_dim)
    _check_data(parser, config)
    encoder = config.encoder
    name = f"moco-{encoder.arch}-{objective_slug(config.objective)}-k{encoder.moco_k}"
    return replace(config, saving=training_folder(parser, config, name))


def _check_data(parser: argparse.ArgumentParser, config: PretrainConfig) -> None:
    check_data_folder(parser, config.data, {"pretrain": config.optim.batch_size})


def _with_preset(
    parser: argparse.ArgumentParser, options: argparse.Namespace, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, str]:
    """Options with the values of --preset where flags are not given, and what they are."""
    unset = {name: parser.get_default(name) for name in (*CHOSEN, "bn_splits")}
    parser.set_defaults(**dict.fromkeys(unset))
    bare = vars(parser.parse_args(argv))
    given = {name: bare[name] for name in unset if bare[name] is not None}
    with refusals(parser):
        data = make_parts(options, PretrainConfig)["data"]
        check_data_folder(parser, data, {"pretrain": 1})
        try:
            images = open_images(
                data.dataset, data.data, "pretrain", per_class=data.images_per_class, quiet=True
            )
            side = typical_side(images)
        except DataError as error:
            parser.error(str(error))
        values, why = small_preset(len(images), side, given)
    parser.set_defaults(**{**unset, **values})
    options = parser.parse_args(argv)
    flags = {name: _as_flag(parser, name, getattr(options, name)) for name in CHOSEN}
    chosen = " ".join(flag for name, flag in flags.items() if flag and name not in given)
    mine = " ".join(flags[name] for name in flags if name in given) or "none of them"
    return options, f"{options.preset}, which chose {chosen} ({why}); given: {mine}"


def _as_flag(parser: argparse.ArgumentParser, name: str, value: Any) -> str:
    """An option as a command line gives it, "" where it needs no word."""
    action = next(action for action in parser._actions if action.dest == name)
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        return flag if value == action.const else ""
    return f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"


def checked(config: Config, outputs: int) -> Config:
    """The config of a training, its memory format settled.

    Raises:
        ValueError: an unknown arch, a stem or image size that does not fit it, no compiler.
    """
    arch, size = config.encoder, config.views.image_size
    encoder = encoders.build_encoder(
        arch.arch, outputs, image_size=size, small_stem=arch.small_stem
    )
    encoders.check_image_size(encoder, size)
    device = torch.device(config.placement.devices[0])
    if config.speed.channels_last is None:
        helps = channels_last_helps(device, config.optim.amp)
        config = replace(config, speed=replace(config.speed, channels_last=helps))
    if config.speed.compile:
        _check_compiler(device)
    return config


def _check_compiler(device: torch.device) -> None:
    """torch.compile makes C++ code for a CPU, and on a GPU Triton compiles its launcher in C."""
    if device.type == "cpu":
        usual = ["clang++" if sys.platform == "darwin" else "g++"]
        variable, language = "CXX", "C++"
    else:
        usual, variable, language = ["gcc", "clang", "cc"], "CC", "C"
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"--compile needs a {language} compiler, and {' or '.join(names)} is not on the PATH; "
            f"install one, name it in the environment variable {variable}, or leave out --compile"
        )
