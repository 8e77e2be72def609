"""Flags made from the fields of a config, and its parts made from parsed flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import secrets
from collections.abc import Iterator
from dataclasses import replace
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from moco.cli.parser import KINDS, Parser
from moco.config import (
    IN_BATCH_DEFAULTS,
    PROBE_DEFAULTS,
    InBatchConfig,
    LinclsConfig,
    Part,
    PretrainConfig,
    SentenceConfig,
    help_of,
    parts_of,
)
from moco.launch import place, usable_cores

# config of a command: its program, what it does, and its defaults where they are not the fields'
COMMANDS: dict[type, tuple[str, str, dict[str, Any]]] = {
    PretrainConfig: ("main_moco.py", "MoCo pretraining with alignment + uniformity", {}),
    LinclsConfig: ("main_lincls.py", "linear evaluation of a frozen encoder", PROBE_DEFAULTS),
    InBatchConfig: (
        "scripts/train_in_batch.py",
        "training within the batch: one encoder, both views, no queue",
        IN_BATCH_DEFAULTS,
    ),
    SentenceConfig: ("scripts/train_sentences.py", "two sentence encoders by Quick-Thought", {}),
}


def parser_of(config: type) -> Parser:
    """The parser of the command with this config."""
    _, description, defaults = COMMANDS[config]
    parser = Parser(description=description, allow_abbrev=False)
    add_options(parser, config)
    parser.set_defaults(**defaults)
    return parser


def add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Add the flags of all parts of a config, in a group for each part."""
    for part in parts_of(config).values():
        title, _, description = part.__doc__.partition("\n\n")[0].partition(": ")
        hints, helps = get_type_hints(part), help_of(part)
        group = parser.add_argument_group(title.strip(), " ".join(description.split()) or None)
        for field in dataclasses.fields(part):
            if field.metadata["flags"]:
                _add_option(group, field, hints[field.name], helps.get(field.name))


def _add_option(
    group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any, help: str | None
) -> None:
    flags, given = field.metadata["flags"], dict(field.metadata["parse"])
    given["help"] = help
    if flags[0].startswith("-"):
        given |= {"dest": field.name, "default": None if field.metadata["unset"] else field.default}
    kind = get_args(hint)[0] if isinstance(hint, UnionType) else hint
    if kind is bool and field.default is None:
        given["action"] = argparse.BooleanOptionalAction
    elif kind is bool:
        given["action"] = "store_false" if field.default else "store_true"
    elif field.metadata["kind"] is not None:
        given["type"] = KINDS[field.metadata["kind"]]
    elif get_origin(kind) is tuple:
        given |= {"type": float, "nargs": len(get_args(kind))}
    else:
        given["type"] = kind
    if given.get("type") in (int, float) and "nargs" not in given:
        given.setdefault("metavar", "N" if kind is int else "X")
    group.add_argument(*flags, **given)


def make_parts(options: argparse.Namespace, config: type) -> dict[str, Part]:
    """The parts of a config from parsed options.

    Raises:
        ValueError: a part refuses its values.
    """
    parts = {}
    for name, part in parts_of(config).items():
        given = {}
        for field in dataclasses.fields(part):
            if field.metadata["flags"]:
                value = getattr(options, field.name)
                if value is not None or not field.metadata["unset"]:
                    given[field.name] = tuple(value) if isinstance(value, list) else value
        if given:
            parts[name] = part.from_options(given)
    return parts


def settle(parts: dict[str, Part]) -> dict[str, Part]:
    """What both mains work out: devices and processes, loader processes of each, the seed."""
    placement = place(parts["launch"])
    workers = parts["data"].workers
    workers = usable_cores() if workers is None else workers
    # -j counts per node, as upstream; each process gets its share, rounded up.
    workers = -(-workers // placement.local_processes)
    seed = parts["optim"].seed
    seeding = {"seed": secrets.randbelow(2**31) if seed is None else seed}
    return {
        **parts,
        "placement": placement,
        "data": replace(parts["data"], workers=workers),
        "optim": replace(parts["optim"], **seeding, seed_given=seed is not None),
    }


@contextlib.contextmanager
def refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Report a value that does not fit as argparse does."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
