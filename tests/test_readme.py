"""README.md and docs/: their commands parse, their files exist, names import, links resolve."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
from helpers import ROOT

from moco import cli
from moco.config import InBatchConfig, LinclsConfig, PretrainConfig, SentenceConfig
from moco.log import QUICKLY_TESTED, TESTED

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = [
    (page, kind, block)
    for page, text in PAGES.items()
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
]
# What `python scripts/make_toy_dataset.py toy` makes, and the place of the user's images.
DATA = ("DIR", "toy")


def commands(program: str) -> list[tuple[str, str]]:
    return [
        (page, line.split(" #")[0].strip())
        for page, kind, block in BLOCKS
        if kind == "sh"
        for line in block.splitlines()
        if program in line.split(" #")[0].split()
    ]


@pytest.mark.parametrize(
    ("config", "programs", "least"),
    [
        (PretrainConfig, ("main_moco.py", "own_task.py"), 9),
        (LinclsConfig, ("main_lincls.py",), 9),
        (InBatchConfig, ("scripts/train_in_batch.py",), 4),
        (SentenceConfig, ("scripts/train_sentences.py",), 3),
    ],
)
def test_commands_parse(config: type, programs: tuple[str, ...], least: int) -> None:
    found = [(*command, program) for program in programs for command in commands(program)]
    assert len(found) >= least
    for page, command, program in found:
        words = shlex.split(command)
        args = cli.parser_of(config).parse_args(words[words.index(program) + 1 :])
        assert args.data in DATA or config is SentenceConfig, f"{page}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    named = set(
        re.findall(
            r"(?<![\w/])(?:scripts|moco|align_uniform|tests|docs)/[\w./-]+\.\w+", PAGES[page]
        )
    )
    assert not sorted(name for name in named if not (ROOT / name).is_file())


def test_names_import() -> None:
    code = "\n".join(block for _, kind, block in BLOCKS if kind == "python")
    imports = re.findall(r"^from ([\w.]+) import (\([^)]*\)|[\w, ]+)", code, re.M)
    assert len(imports) >= 12
    for module, names in imports:
        found = importlib.import_module(module)
        for name in re.findall(r"\w+", names):
            assert hasattr(found, name), f"{module} has no {name}"


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    outside = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", outside, re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(path.relative_to(ROOT))), f"{page}: {target}"


def test_every_page_is_linked_from_the_readme() -> None:
    assert not [page for page in PAGES if page != "README.md" and page not in PAGES["README.md"]]


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_nothing_is_left_to_fill_in() -> None:
    for page, text in PAGES.items():
        assert not re.findall(r"\b[A-Z0-9]+_(?:TABLE|OUTPUT|TIME|SPEED|NOTE)\b", text), page


@pytest.mark.parametrize("page", ["README.md", "docs/design.md"])
def test_the_versions_that_were_tested_are_named(page) -> None:
    text = " ".join(PAGES[page].split())
    for name, versions in TESTED.items():
        assert f"{name} {', '.join(versions)}" in text
    for name, versions in QUICKLY_TESTED.items():
        if name == "torch" or page != "README.md":
            assert all(version in text for version in versions)
