"""The walls of the house (design.md, section 2), read from the import statements of every file."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path.relative_to(ROOT)
    for folder in ("align_uniform", "moco", "scripts", "tests", ".")
    for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))
]
MAINS = {"main_moco", "main_lincls"}


def modules_of(source: str) -> set[str]:
    """Dotted names that a file imports, anywhere in it; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports(path: Path) -> set[str]:
    return modules_of((ROOT / path).read_text(encoding="utf-8"))


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def below(folder: str) -> list[Path]:
    return [path for path in FILES if path.parts[0] == folder]


def uses_collectives(source: str) -> bool:
    """It imports torch.distributed, or names it through torch."""
    if any(name.startswith("torch.distributed") for name in modules_of(source)):
        return True
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and isinstance(node.value, ast.Name)
        and node.value.id == "torch"
        for node in ast.walk(ast.parse(source))
    )


def test_the_files_are_found():
    assert {Path("moco/builder.py"), Path("align_uniform/losses.py"), Path("main_moco.py")} <= set(
        FILES
    )
    assert len(below("moco")) >= 8 and len(below("tests")) >= 8


def test_the_readers_of_imports_see_every_form():
    source = "import a.b\ndef f():\n    from c import d as e\n    import g as h\n"
    assert modules_of(source) == {"a.b", "c", "c.d", "g"}
    for form in ("import torch.distributed as d", "from torch import distributed",
                 "from torch.distributed import all_reduce", "x = torch.distributed.barrier",
                 "from torch.distributed.nn import x"):  # fmt: skip
        assert uses_collectives(form), form
    assert not uses_collectives("from moco import distributed\ndistributed.all_gather(x)")


@pytest.mark.parametrize("path", below("align_uniform"), ids=str)
def test_align_uniform_needs_torch_alone(path):
    """And the standard library, and matplotlib where figures are drawn."""
    figures = {"matplotlib"} if path.parts[1] == "figures" else set()
    allowed = {"torch", "align_uniform"} | set(sys.stdlib_module_names) | figures
    assert packages(path) <= allowed


@pytest.mark.parametrize("path", below("moco"), ids=str)
def test_moco_does_not_know_the_mains_scripts_or_tests(path):
    assert not packages(path) & (MAINS | {"scripts", "tests", "hubconf"})


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_imports_a_main_a_script_or_a_test(path):
    """But tests import mains, and each other's helpers; a script may read another of its folder."""
    scripts = {p.stem for p in below("scripts")} | {"scripts"}
    tests = {p.stem for p in below("tests")} | {"tests"}
    forbidden = set() if path.parts[0] == "tests" else MAINS | tests
    if path.parts[0] not in ("tests", "scripts"):
        forbidden |= scripts
    assert not packages(path) & forbidden


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] != "tests"], ids=str)
def test_only_moco_distributed_names_a_collective(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    allowed = {Path("moco/distributed.py"), Path("moco/launch.py")}
    assert uses_collectives(source) == (path in allowed)


@pytest.mark.parametrize("path", [*below("moco"), *below("align_uniform")], ids=str)
def test_no_library_file_needs_a_gpu_to_be_imported(path):
    """No hard-coded .cuda(): the device is an argument."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    calls = [
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert "cuda" not in calls
