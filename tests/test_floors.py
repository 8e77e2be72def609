"""The floors of the house (docs/design.md), read from the import statements of every file.

Imports go down only; rooms of one floor do not know each other unless `SIBLINGS` says so. An import
counts wherever it stands: within a function or under TYPE_CHECKING it closes a circle as well.
Relative imports, and torch.distributed outside of the collectives, are refused by ruff.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

FLOORS = {
    0: "align_uniform moco",  # moco/__init__.py alone
    1: "moco.config moco.encoders moco.alexnet moco.batch_norm moco.precision moco.distributed "
    "moco.launch moco.log moco.progress moco.profiling moco.timing moco.schedule moco.errors "
    "moco.run_files moco.printable moco.lock moco.stop moco.looks moco.handshake moco.memory "
    "moco.packages moco.pickles moco.sentence_encoders moco.health",
    2: "moco.builder moco.data moco.checkpoint",
    3: "moco.train moco.evaluate moco.tasks moco.publish moco.runs",
    4: "moco.cli",
    5: "main_moco main_lincls hubconf scripts",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
SIBLINGS = {("moco.tasks", "moco.train"), ("moco.tasks", "moco.evaluate")}
# What several benchmarks compare with: no command, and nothing that users import.
NO_COMMANDS = {"scripts.benchmark.baseline"}
# scripts/chaos.py runs the tests' harness.
TESTS_USED = {("scripts.chaos", "harness")}
WITHOUT_TORCH = ("moco.config", "moco.errors", "moco.health", "moco.run_files", "moco.runs")
ALIGN_UNIFORM = {"torch", "align_uniform", *sys.stdlib_module_names}

Tree = dict[str, str]  # dotted name of a module -> its source


def tree_of(root: Path) -> Tree:
    paths = [*root.glob("*.py")]
    for folder in ("align_uniform", "moco", "scripts"):
        paths += sorted((root / folder).rglob("*.py"))
    names = [path.relative_to(root).with_suffix("").as_posix() for path in paths]
    names = [name.removesuffix("/__init__").replace("/", ".") for name in names]
    return {n: p.read_text(encoding="utf-8") for n, p in zip(names, paths, strict=True)}


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def imports(source: str) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each `from module import name`, (module, None) of each `import module`."""
    for node in nodes(source):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def edges(tree: Tree) -> dict[str, set[str]]:
    """Which modules of the tree each one imports. Scripts may name their neighbours alone."""
    scripts = {name.rpartition(".")[2]: name for name in tree if name.startswith("scripts.")}
    found: dict[str, set[str]] = {name: set() for name in tree}
    for module, source in tree.items():
        for target, name in imports(source):
            if module.startswith("scripts.") and target not in sys.stdlib_module_names:
                target = scripts.get(target, target)
            if name and f"{target}.{name}" in tree:
                target = f"{target}.{name}"
            while target and target not in tree:
                target = target.rpartition(".")[0]
            if target:
                found[module].add(target)
    return found


def room_of(module: str) -> str | None:
    while module and module not in FLOOR:
        module = module.rpartition(".")[0]
    return module or None


def problems(tree: Tree) -> list[str]:
    """One line for each breach of the rules; none when the house stands."""
    graph = edges(tree)
    found = []
    for module, source in tree.items():
        if room_of(module) is None or (room_of(module) == "moco" and module != "moco"):
            found.append(f"{module} has no floor")
            continue
        found += [f"{module}: {breach}" for breach in sorted(breaches(module, source))]
        for target in sorted(graph[module]):
            if not may_import(module, target):
                found.append(f"{module} imports {target}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(" -> ".join(reversed(error.args[1])) + " is a circle")
    return found


def may_import(module: str, target: str) -> bool:
    here, there = room_of(module), room_of(target)
    if here == "scripts" and there == "scripts":
        return target in NO_COMMANDS
    if here == there:
        return True
    if FLOOR[here] == FLOOR[there]:
        return FLOOR[here] == 1 or (here, there) in SIBLINGS
    return FLOOR[here] > FLOOR[there]


def breaches(module: str, source: str) -> Iterator[str]:
    """What a file says that no import graph shows."""
    packages = {target.partition(".")[0] for target, _ in imports(source)}
    allowed = ALIGN_UNIFORM | ({"matplotlib"} if ".figures" in module else set())
    if module.startswith("align_uniform") and packages - allowed:
        yield f"needs {', '.join(sorted(packages - allowed))}"
    for name in sorted(packages & {"tests", "conftest", "harness", "helpers", "probes"}):
        if (module, name) not in TESTS_USED:
            yield f"imports the tests' {name}"
    named = [node for node in nodes(source) if isinstance(node, ast.Attribute)]
    paths = sum(node.attr == "path" and ast.unparse(node) == "sys.path" for node in named)
    if paths > (module.startswith("scripts.")):
        yield f"touches sys.path {paths} times"
    calls = [node.func for node in nodes(source) if isinstance(node, ast.Call)]
    if any(isinstance(call, ast.Attribute) and call.attr == "cuda" for call in calls):
        yield "calls .cuda(): the device is an argument"


# ---- The checker can fail ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"moco.builder": "from moco.train import step", "moco.train.step": ""},
         ["moco.builder imports moco.train.step"]),
        ({"moco.builder": "def f():\n    import moco.train", "moco.train": ""},
         ["moco.builder imports moco.train"]),
        ({"moco.builder": "import moco.data.views as v", "moco.data.views": ""},
         ["moco.builder imports moco.data.views"]),
        ({"moco.train": "from moco.evaluate import knn", "moco.evaluate.knn": ""},
         ["moco.train imports moco.evaluate.knn"]),
        ({"moco.tasks.a": "from moco.evaluate import knn", "moco.evaluate.knn": ""}, []),
        ({"moco.log": "import moco.errors", "moco.errors": ""}, []),
        ({"moco.log": "import moco.errors", "moco.errors": "from moco import log"},
         ["moco.log -> moco.errors -> moco.log is a circle"]),
        ({"moco.data.a": "if TYPE_CHECKING:\n    from moco.data.b import B",
          "moco.data.b": "from moco.data import a"},
         ["moco.data.a -> moco.data.b -> moco.data.a is a circle"]),
        ({"moco.data": "from moco.data.a import f", "moco.data.a": "from moco.data import g"},
         ["moco.data -> moco.data.a -> moco.data is a circle"]),
        ({"moco.data": "from moco.data.a import f", "moco.data.a": "from moco import errors",
          "moco.errors": ""}, []),
        ({"moco.something": ""}, ["moco.something has no floor"]),
        ({"setup": ""}, ["setup has no floor"]),
        ({"moco.cli": "import main_moco", "main_moco": ""}, ["moco.cli imports main_moco"]),
        ({"main_moco": "import main_lincls", "main_lincls": ""},
         ["main_moco imports main_lincls"]),
        ({"scripts.preflight": "import timing", "scripts.benchmark.timing": ""},
         ["scripts.preflight imports scripts.benchmark.timing"]),
        ({"scripts.benchmark.step": "import baseline", "scripts.benchmark.baseline": ""}, []),
        ({"scripts.a": "import harness"}, ["scripts.a: imports the tests' harness"]),
        ({"scripts.chaos": "import harness, sys\nsys.path.insert(0, 'tests')"}, []),
        ({"scripts.a": "import sys\nsys.path.insert(0, 'a')\nsys.path.insert(0, 'b')"},
         ["scripts.a: touches sys.path 2 times"]),
        ({"moco.log": "import sys\nsys.path.insert(0, 'a')"},
         ["moco.log: touches sys.path 1 times"]),
        ({"align_uniform.losses": "import numpy"}, ["align_uniform.losses: needs numpy"]),
        ({"align_uniform.losses": "import matplotlib"}, ["align_uniform.losses: needs matplotlib"]),
        ({"align_uniform.figures": "import matplotlib.pyplot, math, torch"}, []),
        ({"align_uniform": "from moco import log", "moco.log": ""},
         ["align_uniform: needs moco", "align_uniform imports moco.log"]),
        ({"moco.log": "x.cuda()"}, ["moco.log: calls .cuda(): the device is an argument"]),
        ({"moco.log": "torch.cuda.synchronize()"}, []),
    ],
)  # fmt: skip
def test_the_checker_sees_each_breach_and_nothing_else(tree, expected) -> None:
    assert problems(tree) == expected


# ---- The house -----------------------------------------------------------------------------------


def test_imports_go_down_only() -> None:
    tree = tree_of(ROOT)
    assert {"moco.builder", "align_uniform.losses", "main_moco", "scripts.preflight"} <= tree.keys()
    assert problems(tree) == []


def test_what_reads_run_folders_needs_no_torch() -> None:
    """Neither directly nor through what it imports: reports come at once, and without a GPU."""
    inside = tuple(f"{room}." for room in WITHOUT_TORCH)
    modules = [m for m in tree_of(ROOT) if m in WITHOUT_TORCH or m.startswith(inside)]
    assert set(WITHOUT_TORCH) <= set(modules)
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch is imported"
