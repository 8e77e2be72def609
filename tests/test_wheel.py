"""What `pip install .` installs holds every package, and works without the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest
from helpers import ROOT, finish, start_python

# Imports all modules below the packages, and prints their names and where they come from.
IMPORT_ALL = """
import importlib, pkgutil
for name in ("align_uniform", "moco"):
    package = importlib.import_module(name)
    print(name, package.__file__)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        print(module.name, importlib.import_module(module.name).__file__)
"""


@pytest.mark.long
def test_the_wheel_holds_all_packages_and_imports_elsewhere(tmp_path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("align_uniform", "moco", "scripts", "tests"):
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=hidden)
    for path in (*ROOT.glob("*.py"), *map(ROOT.joinpath, ("pyproject.toml", "LICENSE"))):
        shutil.copy(path, source)
    for name in ("README.md", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
         "--quiet", "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    assert {path.name for path in site.iterdir() if "." not in path.name} == {
        "align_uniform", "moco",
    }  # fmt: skip
    for name in ("align_uniform/py.typed", "moco/evaluate/neighbours.html.jinja"):
        assert (site / name).is_file(), f"{name} is not a module, and is packaged all the same"
    status, out, err = finish(start_python("-c", IMPORT_ALL, cwd=tmp_path, path=site))
    assert status == 0, err
    imported = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert all(place.startswith(str(site)) for place in imported.values())
    expected = {
        path.relative_to(ROOT)
        .with_suffix("")
        .as_posix()
        .removesuffix("/__init__")
        .replace("/", ".")
        for name in ("align_uniform", "moco")
        for path in (ROOT / name).rglob("*.py")
    }
    assert imported.keys() == expected
