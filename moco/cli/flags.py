"""Flags that several commands have: which images, where their features are computed."""

from __future__ import annotations

import argparse

import torch

from moco.config import IMAGENET_MEAN, IMAGENET_STD, check_image_statistics
from moco.evaluate.extraction import Loading
from moco.launch import usable_cores, visible_devices


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Flags of how images are loaded and where their features are computed."""
    add = parser.add_argument
    add("--batch-size", type=int, default=256, metavar="N", help="%(default)s")
    add("-j", "--workers", type=int, default=usable_cores(), metavar="N")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")


def loading_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Loading:
    check_least(parser, args, batch_size=1, workers=0)
    return Loading(chosen_device(parser, args), args.batch_size, args.workers)


def add_presentation(parser: argparse.ArgumentParser) -> None:
    """Flags that replace what a checkpoint says of its images."""
    add = parser.add_argument
    add("--image-size", type=int, metavar="PX", help="default: the checkpoint's")
    mean = "default: the checkpoint's, else ImageNet's"
    add("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help=mean)
    add("--std", type=float, nargs=3, metavar=("R", "G", "B"))


def check_presentation(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_least(parser, args, image_size=1)
    try:
        check_image_statistics(args.mean or IMAGENET_MEAN, args.std or IMAGENET_STD)
    except ValueError as error:
        parser.error(str(error))


def chosen_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> torch.device:
    """That of --device."""
    try:
        return visible_devices(args.device, None)[0]
    except ValueError as error:
        parser.error(str(error))


def check_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers below the least ones; None is a flag that was not given."""
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and value < smallest:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} must be at least {smallest}, got {value}")
