"""What README.md says can be run: its commands parse, its files exist, its names import."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from moco import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)


def commands(program: str) -> list[str]:
    lines = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if program in line.split(" #")[0]]


@pytest.mark.parametrize(
    ("parser", "program"),
    [(cli.pretrain_parser(), "main_moco.py"), (cli.lincls_parser(), "main_lincls.py")],
)
def test_commands_parse(parser, program: str) -> None:
    found = commands(program)
    assert len(found) >= 3
    for command in found:
        words = shlex.split(command)
        args = parser.parse_args(words[words.index(program) + 1 :])
        assert args.data == "DIR", command


def test_files_exist() -> None:
    named = set(
        re.findall(r"(?:scripts|moco|align_uniform|tests)/[\w./-]+\.(?:py|sh|sbatch)", README)
    )
    assert len(named) > 20
    assert not sorted(name for name in named if not (ROOT / name).is_file())


def test_names_import() -> None:
    lines = [line for kind, text in BLOCKS if kind == "python" for line in text.splitlines()]
    imports = [re.match(r"from ([\w.]+) import ([\w, ]+)", line) for line in lines]
    imports = [found for found in imports if found]
    assert len(imports) >= 4
    for found in imports:
        module = importlib.import_module(found[1])
        for name in found[2].split(","):
            assert hasattr(module, name.strip()), f"{found[1]} has no {name}"


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"\b[A-Z0-9]+_(?:TABLE|OUTPUT|TIME|SPEED|NOTE)\b", README)
