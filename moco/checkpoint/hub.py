"""Checkpoints of the Hugging Face hub, hf://USER/NAME[@REVISION][/FILE], through huggingface_hub.

They are in its cache, and a private repository is read with its token.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moco.errors import CheckpointError, DataError
from moco.packages import import_optional
from moco.run_files import only_weights

_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", re.ASCII)


def is_hub(path: str | os.PathLike) -> bool:
    return os.fspath(path).lower().startswith("hf://")


def hub_file(address: str) -> Path:
    """The file at hf://USER/NAME[@REVISION][/FILE], downloaded once into huggingface_hub's cache.

    Without FILE: model.safetensors; else the only file of weights, of several the only one that
    says "backbone", as the releases of this project have it, rather as .safetensors.

    Raises:
        CheckpointError: no such address, repository or file, no connection, several files to choose
            from, or huggingface_hub is not installed. One line.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise CheckpointError(
            f"{address} is no address of the hub, expected hf://USER/NAME or hf://USER/NAME/FILE"
        )
    repository, revision, name = match.groups()
    try:
        hub = import_optional("huggingface_hub", f"to read {address}")
    except DataError as error:
        raise CheckpointError(str(error)) from None
    try:
        if name is None:
            names = hub.HfApi().list_repo_files(repository, revision=revision)
            name = only_weights(names, address)
        return Path(hub.hf_hub_download(repository, name, revision=revision))
    except CheckpointError:
        raise
    except Exception as error:  # of its own, of its HTTP client's, of the disk
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{address} cannot be had from the hub: {reason}; check the address, the connection "
            "and, for a private repository, `hf auth login`"
        ) from error
