"""Fields of a config: default, flags, resume class and help of each, declared once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

LEARNS, ROUNDS, FREE = "learns", "rounds", "free"

REQUIRED = dataclasses.MISSING  # a default: there is none
UNKNOWN = dataclasses.MISSING  # since: files from before the field are not known


def option(
    default: Any,
    flags: str,
    resume: str,
    *,
    least: float | None = None,
    since: Any = UNKNOWN,
    kind: str | None = None,
    unset: bool = False,
    **parse: Any,
) -> Any:
    """A field of a config.

    Args:
        default: its value where the flag is not given, or REQUIRED.
        flags: names on the command line; "" for a value that is worked out.
        resume: LEARNS, ROUNDS or FREE.
        least: the smallest allowed value; values must be finite then. None allows all.
        since: the value that files from before this field existed were made with.
        kind: how the text is read, where its type does not say it: a name in `moco.cli.KINDS`.
        unset: the parsed value is None where the flag was not given, in place of the default.
        parse: more for argparse: choices, metavar.
    """
    if resume not in (LEARNS, ROUNDS, FREE):
        raise ValueError(f"resume must be {LEARNS!r}, {ROUNDS!r} or {FREE!r}, got {resume!r}")
    about = dict(least=least, since=since, kind=kind, unset=unset, parse=parse)
    metadata = {"flags": flags.split(), "resume": resume, **about}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One concern of a config, and a group of flags in --help.

    The docstring's first line is the group's title, perhaps with ": " and a description; a line
    `field: text` is that field's help, where `%(default)s` stands for the default.
    """

    def __post_init__(self) -> None:
        """Raise ValueError for a number below its field's least, by the flag's name."""
        for field in dataclasses.fields(self):
            least = field.metadata["least"]
            if least is None:
                continue
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not least <= number < math.inf:
                    number_of = "a number of " if field.metadata["kind"] == "rate" else ""
                    raise ValueError(
                        f"{flag_of(field)} must be {number_of}at least {least}, got {number}"
                    )

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> Part:
        """From parsed options; `unset` ones are there only where they were given."""
        return cls(**given)


def flag_of(field: dataclasses.Field) -> str:
    """The flag by which messages name a field: the one spelled as the field, or the first."""
    flags = field.metadata["flags"]
    spelled = f"--{field.name.replace('_', '-')}"
    return spelled if spelled in flags or not flags else flags[0]


def help_of(part: type[Part]) -> dict[str, str]:
    """Field -> help, from the docstrings of a part and of the parts that it extends."""
    texts: dict[str, str] = {}
    for cls in reversed(part.__mro__):
        names = {field.name for field in dataclasses.fields(cls)} if issubclass(cls, Part) else ()
        current = None
        for line in (cls.__doc__ or "").splitlines() if names else ():
            name, colon, text = line.strip().partition(": ")
            if colon and name in names:
                current, texts[name] = name, text
            elif current and line.strip():
                texts[current] += f" {line.strip()}"
    return texts


def parts_of(config: type) -> dict[str, type[Part]]:
    """Name -> class of the parts of a config."""
    return get_type_hints(config)


def option_fields(config: type) -> Iterator[dataclasses.Field]:
    """The fields of all parts of a config."""
    for part in parts_of(config).values():
        yield from dataclasses.fields(part)


def flat_values(config: Any) -> dict[str, Any]:
    """Name -> plain value of all fields: paths as text, tuples as lists. What only this process
    has, its devices and number, is left out."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flat_values(value)
        elif field.name not in ("devices", "number"):
            flat[field.name] = plain(value)
    return flat


def from_flat(part: type[Part], flat: Mapping[str, Any]) -> Part:
    """A part from values by their flat names (`flat_values`); defaults for the rest."""
    values = {}
    for field in dataclasses.fields(part):
        if field.name in flat:
            value = flat[field.name]
            is_folder = field.metadata["kind"] == "folder" and value is not None
            value = Path(value) if is_folder else value
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return part(**values)


def plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
