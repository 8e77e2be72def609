"""Checkpoints from http(s) addresses, kept in torch's cache.

torch.hub.load_state_dict_from_url unpickles without restriction and knows no safetensors, so only
its download is used; `moco.checkpoint.files` reads the file before it gets a name in the cache.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import socket
import ssl
import sys
import urllib.error
import uuid
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import torch.hub

from moco import distributed
from moco.checkpoint.files import read_unwarned, warn_of
from moco.checkpoint.hashes import check_hash, checked_digits, has_hash, hash_in_name
from moco.errors import CheckpointError

_SILENCE = 60.0  # seconds without a byte until a server counts as gone
# What a server or the way to it can do; any other OSError is of this machine's disk.
_NETWORK = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
    ValueError,
)


def is_url(path: str | os.PathLike) -> bool:
    """Whether a checkpoint is named by an address (scheme://...) and not by a file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def read_url(url: str, sha256: str | None = None) -> dict:
    """The content of a checkpoint at an http or https address, as `read_checkpoint` gives it.

    It is downloaded once into torch.hub.get_dir()/checkpoints. Its SHA-256 is compared, each time,
    with `sha256`, else with the hash in its name (`name-<8 or more hex digits>.pth`). Without
    either, another address may have the same name, so the cached file's name has a hash of the
    address. What does not arrive whole or cannot be read leaves nothing in the cache. Any number
    of processes may ask for the same file at once.

    Args:
        url: the address.
        sha256: the hash that the file must have, or its first 8 digits or more.

    Raises:
        CheckpointError: nothing there, no connection, another hash, or no checkpoint. One line,
            with the address and what to do.
    """
    name, expected = _name_and_hash(url, sha256)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    cached = folder / name
    # Several processes write files of their own; the last one to finish gives the name.
    temporary = folder / f".{uuid.uuid4().hex}.{name}"
    is_new = not (cached.is_file() and has_hash(cached, expected))
    try:
        if is_new:
            folder.mkdir(parents=True, exist_ok=True)
            _download(url, temporary)
            check_hash(temporary, expected, url)
        content, unchecked = read_unwarned(temporary if is_new else cached)
        if is_new:
            os.replace(temporary, cached)
    except CheckpointError as error:
        if not is_new:
            raise CheckpointError(
                f"{error}; delete it, so that {url} is downloaded anew"
            ) from error
        raise CheckpointError(str(error).replace(str(temporary), url)) from error
    except OSError as error:
        raise CheckpointError(
            f"{url} cannot be kept in torch's cache {folder}: {error.strerror or error}; set "
            "TORCH_HOME to another folder"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
    if unchecked and expected is None:
        warn_of(url, unchecked)
    return content


def _name_and_hash(url: str, sha256: str | None) -> tuple[str, str | None]:
    """Name in the cache, and digits that the file's hash must begin with."""
    try:
        parts = urlsplit(url)
        name = PurePosixPath(unquote(parts.path, errors="strict")).name
        host = parts.hostname
    except ValueError as error:
        raise CheckpointError(f"{url} is no valid address: {error}") from error
    if parts.scheme.lower() not in ("http", "https"):
        raise CheckpointError(
            f"{url}: only http and https addresses are read; fetch the file by other means and "
            "give its path"
        )
    if not host or name in ("", "..") or not name.isprintable() or len(name.encode()) > 150:
        raise CheckpointError(f"{url} does not name a file; give the address of the checkpoint")
    expected = checked_digits(sha256) or hash_in_name(name)
    if expected is None:
        stem, dot, rest = name.partition(".")
        name = f"{stem}@{hashlib.sha256(url.encode()).hexdigest()[:8]}{dot}{rest}"
    return name, expected


def _download(url: str, path: Path) -> None:
    before = socket.getdefaulttimeout()
    shows = distributed.is_main() and sys.stderr.isatty()
    try:
        socket.setdefaulttimeout(before or _SILENCE)
        torch.hub.download_url_to_file(url, str(path), progress=shows)
    except urllib.error.HTTPError as error:
        raise CheckpointError(
            f"{url} cannot be downloaded: the server says {error.code} {error.reason}; check the "
            "address, or download the file by other means and give its path"
        ) from error
    except _NETWORK as error:
        reason = getattr(error, "reason", None) or error
        said = " ".join(str(reason).split()) or type(reason).__name__
        raise CheckpointError(
            f"{url} cannot be downloaded: {said}; check the address and the connection, or "
            "download the file by other means and give its path"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
