"""Checkpoints from http(s) addresses, kept in torch's cache.

torch.hub.load_state_dict_from_url unpickles without restriction and knows no safetensors;
torch.hub.download_url_to_file waits for ever on a server that trickles, fills the disk from one
that does not end, and shows passwords. So the download is here, in torch's cache and by its names;
`moco.checkpoint.files` reads a file before it gets its name there.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

import torch.hub
from tqdm import tqdm

from moco import distributed
from moco.checkpoint.files import read_unwarned, warn_of
from moco.checkpoint.hashes import check_hash, checked_digits, has_hash, hash_in_name
from moco.errors import CheckpointError

SILENCE = 60.0  # seconds without a byte until a server counts as gone
MOST_SECONDS = 3600.0  # for a whole file
MOST_BYTES = 8 * 2**30
_TOO_LARGE = (
    f"it is larger than {MOST_BYTES >> 30} GiB, which no checkpoint of an image encoder is; check "
    "the address"
)
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


def without_secrets(path: str | os.PathLike) -> str:
    """A path or address as messages have it: without password and without what follows "?", where
    signatures and tokens are."""
    if not is_url(path):
        return str(path)
    scheme, _, rest = str(path).partition("://")
    name, query, _ = rest.partition("?")
    host, slash, inside = _USER.sub("", name.partition("#")[0]).partition("/")
    host = host.rpartition("@")[2]  # of a password that has an @
    return f"{scheme}://{host}{slash}{inside}{'?...' if query else ''}"


# User and password before a host; not the port and path of one that has an @ in its path.
_USER = re.compile(r"^(?:(?![^/@]*:\d+/)[^/@]*:[^@]*|[^/@]*)@")


def read_url(url: str, sha256: str | None = None) -> dict:
    """The content of a checkpoint at an http or https address, as `read_checkpoint` gives it.

    It is downloaded once into torch.hub.get_dir()/checkpoints. Its SHA-256 is compared, each time,
    with `sha256`, else with the hash in its name (`name-<8 or more hex digits>.pth`). Without
    either, another address may have the same name, so the cached file's name has a hash of the
    address. What does not arrive whole or cannot be read leaves nothing in the cache. Any number
    of processes may ask for the same file at once.

    Args:
        url: the address; `USER:PASSWORD@` before the host is sent to it and shown to nobody.
        sha256: the hash that the file must have, or its first 8 digits or more.

    Raises:
        CheckpointError: nothing there, no connection, too large or too slow, another hash, or no
            checkpoint. One line, with the address and what to do.
    """
    called = without_secrets(url)
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
            check_hash(temporary, expected, called)
        content, unchecked = read_unwarned(temporary if is_new else cached)
        if is_new:
            os.replace(temporary, cached)
    except CheckpointError as error:
        if not is_new:
            raise CheckpointError(
                f"{error}; delete it, so that {called} is downloaded anew"
            ) from error
        raise CheckpointError(str(error).replace(str(temporary), called)) from error
    except OSError as error:
        raise CheckpointError(
            f"{called} cannot be kept in torch's cache {folder}: {error.strerror or error}; set "
            "TORCH_HOME to another folder"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
    if unchecked and expected is None:
        warn_of(called, unchecked)
    return content


def _name_and_hash(url: str, sha256: str | None) -> tuple[str, str | None]:
    """Name in the cache, and digits that the file's hash must begin with."""
    called = without_secrets(url)
    try:
        parts = urlsplit(url)
        name = PurePosixPath(unquote(parts.path, errors="strict")).name
        host = parts.hostname
    except ValueError as error:
        raise CheckpointError(f"{called} is no valid address: {error}") from error
    try:
        _ = parts.port
    except ValueError:  # names what stands there, which may be a part of a password
        raise CheckpointError(f"{called} is no valid address: its port is no number") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise CheckpointError(
            f"{called}: only http and https addresses are read; fetch the file by other means and "
            "give its path"
        )
    if not host or name in ("", "..") or not name.isprintable() or len(name.encode()) > 150:
        raise CheckpointError(f"{called} does not name a file; give the address of the checkpoint")
    expected = checked_digits(sha256) or hash_in_name(name)
    if expected is None:
        stem, dot, rest = name.partition(".")
        name = f"{stem}@{hashlib.sha256(url.encode()).hexdigest()[:8]}{dot}{rest}"
    return name, expected


def _download(url: str, path: Path) -> None:
    """Write what an address has to a file.

    Raises:
        CheckpointError: it cannot be had, or is larger or slower than any checkpoint.
        OSError: the file cannot be written.
    """
    shows = distributed.is_main() and sys.stderr.isatty()
    try:
        with urllib.request.urlopen(_request(url), timeout=SILENCE) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            if size > MOST_BYTES:
                raise _failed(url, _TOO_LARGE)
            with (
                open(path, "wb") as file,
                tqdm(total=size or None, disable=not shows, unit="B", unit_scale=True) as bar,
            ):
                _copy(url, answer, file, bar)
            if path.stat().st_size < size:
                arrived = f"{path.stat().st_size} bytes of {size}"
                raise _failed(url, f"it did not arrive whole ({arrived}); try again")
    except urllib.error.HTTPError as error:
        said = f"the server says {error.code} {error.reason}; check the address"
        raise _failed(url, said) from error
    except CheckpointError:
        raise
    except _NETWORK as error:
        reason = getattr(error, "reason", None) or error
        said = " ".join(str(reason).split()) or type(reason).__name__
        raise _failed(url, f"{said}; check the address and the connection") from error


def _copy(url: str, answer: http.client.HTTPResponse, file: BinaryIO, bar: tqdm) -> None:
    """Each piece as it comes: to wait for more is to wait for a server that trickles."""
    deadline = time.monotonic() + MOST_SECONDS
    while piece := answer.read1(2**20):
        if file.tell() + len(piece) > MOST_BYTES:
            raise _failed(url, _TOO_LARGE)
        if time.monotonic() > deadline:
            said = f"only {file.tell()} bytes came in {MOST_SECONDS:.0f} seconds; try again"
            raise _failed(url, said)
        file.write(piece)
        bar.update(len(piece))


def _failed(url: str, said: str) -> CheckpointError:
    return CheckpointError(
        f"{without_secrets(url)} cannot be downloaded: {said}, or download the file by other means "
        "and give its path"
    )


def _request(url: str) -> urllib.request.Request:
    """With a user and password of the address in a header, which no other host is sent."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    bare = urlunsplit(parts._replace(netloc=host, fragment=""))
    request = urllib.request.Request(bare, headers={"User-Agent": "torch.hub"})
    if at:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request
