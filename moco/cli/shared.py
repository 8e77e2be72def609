"""What several commands ask of their flags: a device, numbers that are large enough."""

from __future__ import annotations

import argparse
import math

import torch

from moco.launch import visible_devices


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


def count(text: str) -> int:
    """argparse type of a number of things."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive finite number, got {text}")
    return value


def positives(text: str) -> list[float]:
    """argparse type of "1,2,3": each once, in ascending order."""
    return sorted({positive(part) for part in text.split(",")})
