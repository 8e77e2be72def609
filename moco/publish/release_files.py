"""The files of a release: their names, which are there, and reading the small ones."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath

from moco.errors import CheckpointError
from moco.run_files import ARGS, LINCLS_RESULT, LOG

SUMS, CARD, CONFIG, METRICS = "SHA256SUMS", "README.md", "config.json", "align_uniform.json"
PROBE, PROBE_ARGS, PROBE_LOG = (f"lincls/{name}" for name in (LINCLS_RESULT, ARGS, LOG))
WEIGHTS = re.compile(r"([A-Za-z0-9_-]+)-(backbone|full|linear)-([0-9a-f]{8})\.(pth|safetensors)")
_DEEPEST = 4  # folders within each other


def listed(folder: str | os.PathLike) -> list[str]:
    """The files of a release in order, relative to it: all but the sums and what begins with a dot
    at the top, which git and download tools leave there.

    Raises:
        CheckpointError: a link, a pipe or the like, or folders nested more than `_DEEPEST` deep.
    """
    found, todo = [], [""]
    while todo:
        inside = todo.pop()
        for entry in os.scandir(os.path.join(folder, inside)):
            name = f"{inside}{entry.name}"
            if name.startswith("."):
                continue
            if entry.is_symlink():
                raise CheckpointError(
                    f"{name} is a symbolic link; a release holds files: copy the folder by cp -rL"
                )
            if entry.is_dir():
                if name.count("/") >= _DEEPEST:
                    raise CheckpointError(f"{name[:100]}: more than {_DEEPEST} folders deep")
                todo.append(f"{name}/")
            elif not entry.is_file():
                raise CheckpointError(f"{name} is neither a file nor a folder")
            elif name != SUMS:
                found.append(name)
    return sorted(found)


def read_sums(folder: str | os.PathLike) -> dict[str, str]:
    """{path: SHA-256} of SHA256SUMS.

    Raises:
        ValueError: a line of another form, or a path that leads out of the folder.
    """
    sums = {}
    for line in Path(folder, SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        path = PurePosixPath(match[2]) if match else None
        if path is None or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{SUMS} has a line that is no sum of a file in it: {line[:100]!r}")
        sums[str(path)] = match[1]
    return sums


def weights(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """{(kind, suffix): the files NAME-KIND-HASH.SUFFIX, by name}."""
    found: dict[tuple[str, str], list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if match := WEIGHTS.fullmatch(path.name):
            found.setdefault(match.group(2, 4), []).append(path)
    return found


def is_encoder_only(folder: Path) -> bool:
    """Its one file of weights is the encoder as .safetensors (release.py --encoder-only)."""
    counts = {kind: len(paths) for kind, paths in weights(folder).items()}
    return counts == {("backbone", "safetensors"): 1}


def only_weights(folder: Path, kind: str, suffix: str) -> Path:
    """The one file NAME-KIND-HASH.SUFFIX.

    Raises:
        ValueError: there is none, or several.
    """
    paths = weights(folder).get((kind, suffix), [])
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} files NAME-{kind}-HASH.{suffix}, expected one")
    return paths[0]


def read_json(path: Path, *, or_empty: bool = False) -> dict:
    if or_empty and not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is not used: its values are nested too deeply") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values
