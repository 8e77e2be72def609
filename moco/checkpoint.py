"""Checkpoint files: written whole or not at all, read without running code, understood whoever
wrote them.

A pretraining checkpoint is a plain dict of tensors, numbers, strings, lists and dicts:

    version     1
    arch        name for `build_encoder`
    epoch       finished epochs
    step        optimizer steps since the start of the run; step_in_epoch of them in this epoch
    state_dict  of MoCo, names prefixed "module." as upstream's are
    optimizer   state dict;  scaler: of the fp16 gradient scaler, else None
    skipped     steps that the scaler left out;  skipped_in_a_row: the latest of them
    shuffle_generator  state of the key shuffle
    rng         torch's generator state of every rank;  cuda_rng: that of their GPUs, else None
    means       what the next line of rank 0's log is made of
    args        the command line
    checksum    SHA-256 of all the others
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from moco.encoders import (
    ProjectionHead,
    arch_names,
    build_encoder,
    get_head,
    head_name,
    set_head,
)

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A file that is not what it should be; the message names the file and what was expected."""


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def write_checkpoint(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint atomically: after a crash at any moment the file is whole or not there.

    A checksum of everything in it is kept beside the tensors and verified by `read_checkpoint`.
    """
    path = Path(path)
    content = {**content, "checksum": checksum(content)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            sink = _Sink(file)
            try:
                torch.save(content, sink)
            except RuntimeError as error:
                raise sink.error or error from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


class _Sink:
    """What torch.save writes to. It makes "unexpected pos" of a full disk: keeps the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint or state dict of any origin onto the CPU, without running code from it.

    What is checked: torch's zip format by the archive's own CRCs, which `torch.load` does not look
    at; this project's files by their checksum too; the sizes that a file declares against what it
    holds; weights and optimizer state for NaN and infinity. Torch's old format (before 1.6) has no
    checksums, so a changed number goes unnoticed there: a warning says so.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, not finite, or one that wants to run code. The
            message says what the file seems to be, what was expected and what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path} is a folder; give a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        head, size = _head(path), path.stat().st_size
        other = _other_kind(head, size, path.suffix)
        if other:
            raise _not_a_checkpoint(path, *other)
        has_checksums = True
        if path.suffix == ".safetensors":
            content = _read_safetensors(path)
        elif head.startswith(_ZIP):
            content = _read_zip(path)
        else:
            content = _read_legacy(path)
            has_checksums = isinstance(content, dict) and "checksum" in content
        _check_content(content, size, path)
        expected = content.pop("checksum", None)
        if expected is not None and expected != checksum(content):
            raise _damaged(path, "its content does not match its checksum")
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(path, str(error)) from error
    except zipfile.BadZipFile as error:
        raise _damaged(path, f"its zip archive is not whole ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        raise _damaged(path, f"{type(error).__name__}: {_first_sentence(error)}") from error
    if isinstance(content.get("version"), int) and content["version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {content['version']}, this code reads up to "
            f"{FORMAT_VERSION}; update it"
        )
    if not has_checksums:
        warnings.warn(
            f"{path} is in torch's old format, which has no checksums: only its structure could be "
            "checked, changed numbers go unnoticed. To have checksums from now on, load it with "
            "torch.load(FILE, weights_only=True) and torch.save it again",
            stacklevel=2,
        )
    return content


def _not_a_checkpoint(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}; expected a checkpoint as torch.save writes it, or a .safetensors file. "
        f"{remedy}"
    )


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {how}. It may be truncated: copy or download it again and compare its "
        f"size ({path.stat().st_size} bytes here), or use an earlier checkpoint"
    )


def _unsafe_or_damaged(path: Path, message: str) -> CheckpointError:
    """The unpickler stops at anything but tensors and plain values, before it is used."""
    asked_for = re.search(r"GLOBAL ([\w.]+)", message)
    if asked_for is None:
        reason = re.search(r"WeightsUnpickler error: (.+)", message)
        return _damaged(path, reason[1] if reason else "its pickle cannot be read")
    return CheckpointError(
        f"{path} is not a checkpoint that can be read safely, and nothing in it was run: it asks "
        f"for {asked_for[1]}, and tensors and plain values are all that was expected (or it is "
        "damaged there). If you trust its author, take the tensors out in a session of your own: "
        'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW)'
    )


_ZIP = b"PK\x03\x04"  # torch.load decides by this too; an archive can also hang behind a pickle
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")
_UNPACK = "Unpack it and give the file inside"
# First bytes of files that lie where a checkpoint should be: what it is, what to do.
_OTHER_KINDS = (
    (b"version https://git-lfs.github.com/spec", "is a git-lfs pointer", "Run `git lfs pull`"),
    (b"\xff\xd8\xff", "is a JPEG image", "Check the path"),
    (b"\x89PNG", "is a PNG image", "Check the path"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes it", "Convert its weights with h5py"),
    (b"\x1f\x8b", "is compressed by gzip", _UNPACK),
    (b"BZh", "is compressed by bzip2", _UNPACK),
    (b"\xfd7zXZ", "is compressed by xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", _UNPACK),
    (b"7z\xbc\xaf", "is a 7z archive", _UNPACK),
)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _other_kind(head: bytes, size: int, suffix: str) -> tuple[str, str] | None:
    """What a file is that is certainly no checkpoint, and what to do; None when it may be one."""
    if not size:
        return "is empty", "Copy or download it again; perhaps the disk was full"
    if not head.strip(b"\0"):
        return "begins with nothing but zeros", "Copy or download it again"
    if head.lstrip().lower().startswith(_HTML):
        return (
            "is a web page (HTML or XML), perhaps an error or log-in page",
            "Download it again, from the link of the file itself",
        )
    if head[257:262] == b"ustar":
        return "is a tar archive (which checkpoints named .pth.tar are not)", _UNPACK
    for start, what, remedy in _OTHER_KINDS:
        if head.startswith(start):
            return what, remedy
    if suffix == ".safetensors":
        return None
    if head[8:10] == b'{"':
        return "seems to be a safetensors file", "Rename it to end in .safetensors"
    if head.startswith((_ZIP, b"\x80")):  # b"\x80" begins a pickle
        return None
    kind = "a text file" if head.isascii() and b"\0" not in head else "of an unknown kind"
    return f"is {kind} (it begins with {head[:20]!r})", "Check the path, or download it again"


def _read_zip(path: Path) -> object:
    """Looks at what `torch.load` does not: the CRCs, and before unpacking anything whether the
    directory declares more than the file can hold."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if not any(name.endswith("/data.pkl") for name in names):
            what = f"is a zip archive of other things ({', '.join(names[:3]) or 'none'})"
            raise _not_a_checkpoint(path, what, _UNPACK)
        if any(name.endswith("/constants.pkl") for name in names):
            raise _not_a_checkpoint(
                path,
                "is a TorchScript program, which is code",
                "If you trust its author: torch.save(torch.jit.load(FILE).state_dict(), NEW)",
            )
        declared = sum(entry.file_size for entry in entries)
        if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _not_a_checkpoint(
                path,
                f"is a compressed zip archive, which torch.save never writes: {size} bytes that "
                f"would become {declared}, perhaps to fill the memory",
                "If you trust its author: unpack it, and pack it again with zip -0 -r",
            )
        if len(set(names)) < len(names) or min(entry.header_offset for entry in entries):
            raise _damaged(path, "its zip directory is not one that torch.save writes")
        damaged = archive.testzip()
        if damaged:
            raise _damaged(path, f"wrong checksum in {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_legacy(path: Path) -> object:
    with open(path, "rb") as file:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if file.read(1):
            raise _damaged(path, "something follows its last tensor")
    return content


_PLAIN = (str, int, float, bytes, type(None), torch.device, torch.dtype)
_MOST_VALUES, _DEEPEST = 200_000, 50  # far above any checkpoint's


def _check_content(content: object, size: int, path: Path) -> None:
    """Refuse what would break later: other than tensors and plain values, tensors larger than the
    file, endless nesting, and numbers that are not finite in what is trained."""
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__} instead of a dict"
        raise _not_a_checkpoint(path, what, "Save a dict of tensors, such as module.state_dict()")
    trained = ("state_dict", "optimizer") if "state_dict" in content else content
    count = 0
    todo: list[tuple[tuple, object]] = [((), content)]  # (keys that lead there, value)
    while todo:
        where, value = todo.pop()
        count += 1
        if count > _MOST_VALUES or len(where) > _DEEPEST:
            raise CheckpointError(f"{path} is refused: it has no end of nested values")
        if isinstance(value, dict):
            todo += [((*where, "key"), key) for key in value]
            todo += [((*where, key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            todo += [((*where, index), item) for index, item in enumerate(value)]
        elif isinstance(value, Tensor):
            name = ".".join(map(str, where))
            ordinary = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
            if not ordinary or value.device.type != "cpu" or value.is_quantized:
                raise CheckpointError(f"{path}: {name} is no ordinary tensor of numbers")
            if value.numel() * value.element_size() > size:
                raise _damaged(path, f"{name} declares more numbers than the file holds")
            if where[0] in trained and not value.isfinite().all():
                raise CheckpointError(
                    f"{path} holds NaN or infinity in {name}: its training had failed, or it is "
                    "damaged. Use an earlier checkpoint"
                )
        elif not isinstance(value, _PLAIN):
            raise CheckpointError(
                f"{path}: {'.'.join(map(str, where))} is a {type(value).__name__}, expected "
                "tensors and plain values"
            )


def checksum(content: object) -> str:
    """SHA-256 over names, types, shapes and bytes of everything in nested dicts and lists."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
        elif isinstance(value, dict):
            digest.update(f"dict{len(value)}".encode())
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"list{len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


def to_host(content: object) -> object:
    """A copy of nested dicts and lists whose tensors are copies in host memory, row by row
    whatever their memory format was (channels_last), as every reader expects."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(content, dict):
        return {key: to_host(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(to_host(value) for value in content)
    return content


def require_keys(content: dict, keys: Sequence[str], path: str | os.PathLike) -> None:
    """Raise CheckpointError unless a pretraining checkpoint has all `keys`."""
    for key in keys:
        if key not in content:
            raise CheckpointError(f"{path} has no {key!r}, so it is no pretraining checkpoint")


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors: pip install it") from None
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

_EPOCH_NAME = re.compile(r"checkpoint_(\d{4,})\.pth\.tar")
_STEP_NAME = re.compile(r"step_(\d{8,})\.pth\.tar")


def epoch_path(folder: Path, epoch: int) -> Path:
    """File of the 0-based finished `epoch`."""
    return folder / f"checkpoint_{epoch:04d}.pth.tar"


def step_path(folder: Path, step: int) -> Path:
    """File of a save within an epoch, after `step` optimizer steps."""
    return folder / f"step_{step:08d}.pth.tar"


def run_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints of a run folder, the oldest first, by how far the run had come."""
    paths = [
        path
        for path in Path(folder).glob("*.pth.tar")
        if _EPOCH_NAME.fullmatch(path.name) or _STEP_NAME.fullmatch(path.name)
    ]
    return sorted(paths, key=_position)


def _position(path: Path) -> tuple[float, int]:
    """(finished epochs, steps). Times of files are no guide: a copied folder has new ones."""
    epoch = _EPOCH_NAME.fullmatch(path.name)
    if epoch:
        return int(epoch[1]) + 1, 0
    step = int(_STEP_NAME.fullmatch(path.name)[1])
    try:
        # Of a save within an epoch only the content tells the epoch; its tensors stay on disk.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["epoch"]), step
    except Exception:  # damaged in whatever way: tried first by `newest_valid`, which says so
        return float("inf"), step


def newest_valid(folder: str | os.PathLike, say: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run folder that can be read whole; None when there is none.

    Damaged ones are passed over and named by `say`.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    paths = run_checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            say(f"passing over a checkpoint: {error}")
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def prune_checkpoints(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` and those of every `keep_every`-th epoch (0: none).

    Saves within an epoch that cannot be read stay where they are, and take no other's place.
    """
    readable = [path for path in run_checkpoints(folder) if _position(path)[0] < float("inf")]
    for path in readable[:-keep_last]:
        epoch = _EPOCH_NAME.fullmatch(path.name)
        if not (epoch and keep_every and (int(epoch[1]) + 1) % keep_every == 0):
            path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what a process that was killed while writing has left behind."""
    for path in folder.glob(".*.pth.tar.*.tmp"):
        path.unlink(missing_ok=True)


def saved_args(content: dict) -> dict:
    """The arguments in a checkpoint; {} for files of others."""
    args = content.get("args")
    return args if isinstance(args, dict) else {}


# ------------------------------------------------------------------------------------------------
# Encoders from files of any origin
# ------------------------------------------------------------------------------------------------


def load_encoder(path: str | os.PathLike, head: str = "none") -> tuple[nn.Module, dict]:
    """Build the encoder that a checkpoint holds, in eval mode on the CPU.

    Reads pretraining checkpoints of this project, of upstream MoCo v1/v2 and of
    moco_align_uniform (the query encoder), linear-evaluation checkpoints, and plain torchvision
    state dicts, also as safetensors. Architecture, stem and head are found from the tensors.

    Args:
        path: the file.
        head: "none" for features (N, feature_dim) with Identity as last layer; "projection" for
            MoCo's linear or MLP head; "linear" for a trained linear classifier.

    Returns:
        (encoder, info). info has `arch`, `small_stem`, `epoch` and `objective` (None where the
        file does not say), `layout` ("moco", "lincls" or "plain"), `head` (what the file has:
        "none", "linear" or "mlp"), `feature_dim`, `matched` (tensors of the encoder that the file
        filled, which is all of them), `ignored` (names in the file that have no place in the
        encoder) and `args` (the command line it was trained by, {} if unknown).

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, no known architecture fits (the message names what is
            missing, unexpected or of another shape), or no such head.
    """
    if head not in ("none", "projection", "linear"):
        raise ValueError(f'head must be "none", "projection" or "linear", got {head!r}')
    content = read_checkpoint(path)
    state, layout = _encoder_state(content, path)
    args = content.get("args") if isinstance(content.get("args"), dict) else {}
    encoder = _fit_arch(state, content.get("arch"), path)

    name = head_name(encoder)
    in_file = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
    kind = _head_kind(in_file, name, bias=get_head(encoder).bias is not None)
    if head == "none":
        set_head(encoder, nn.Identity())
    else:
        _check_head(head, kind, layout, path)
        set_head(encoder, _head_like(in_file, name, kind, encoder.feature_dim, path))
    wanted = encoder.state_dict()
    for key, tensor in wanted.items():
        if key not in state or state[key].shape != tensor.shape:
            found = tuple(state[key].shape) if key in state else "nothing"
            raise CheckpointError(f"{path}: {key} is {found}, expected {tuple(tensor.shape)}")
        if state[key].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {key} holds {state[key].dtype}, expected {tensor.dtype}"
            )
    for key in wanted:  # in place of a new dict: this one knows the versions of its modules
        wanted[key] = state[key]
    encoder.load_state_dict(wanted)
    encoder.eval()
    info = {
        "arch": encoder.arch,
        "small_stem": encoder.small_stem,
        "epoch": content.get("pretrained_epochs", content.get("epoch")),
        "objective": args.get("objective"),
        "layout": layout,
        "head": kind,
        "feature_dim": encoder.feature_dim,
        "matched": len(wanted),
        "ignored": sorted(set(state) - set(wanted)),
        "args": args,
    }
    return encoder, info


def _encoder_state(content: dict, path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """The tensors of the (query) encoder with torchvision's names, and the layout they were in."""
    named = content.get("state_dict", content)
    if not isinstance(named, dict):
        raise CheckpointError(f"{path}: state_dict is a {type(named).__name__}, expected a dict")
    state: dict[str, Tensor] = {}
    for key, value in named.items():
        name = str(key).removeprefix("module.")
        if name in state:
            raise CheckpointError(f"{path} holds {name} twice, with and without module.")
        if isinstance(value, Tensor):
            state[name] = value
    # Before torch 0.4.1 batch norm did not count its batches.
    for name in [name for name in state if name.endswith(".running_var")]:
        state.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    query = {
        key.removeprefix("encoder_q."): value
        for key, value in state.items()
        if key.startswith("encoder_q.")
    }
    if query:
        return query, "moco"
    if not state:
        raise CheckpointError(
            f"{path} holds no tensors by name, only {', '.join(map(str, list(named)[:5]))}; "
            "expected an encoder's state dict, or a dict that has one as state_dict"
        )
    return state, "lincls" if "state_dict" in content else "plain"


def _fit_arch(state: dict[str, Tensor], arch: object, path: str | os.PathLike) -> nn.Module:
    """The encoder whose backbone has exactly the names and shapes of `state`, with random weights.

    The name that the file gives is tried first, then all of that kind that `build_encoder` knows.
    """
    named = [arch] if arch in arch_names() else []
    is_resnet = any(key.startswith("layer1.") for key in state)
    if not is_resnet and not any(key.startswith(_OTHER_ARCHS) for key in state):
        rest = []  # trying takes seconds
    else:
        rest = [name for name in arch_names() if ("resne" in name) == is_resnet]
        rest = sorted(set(rest) - set(named), key=lambda name: ("resnet" not in name, name))
    stem = state.get("conv1.weight")
    small = stem is not None and tuple(stem.shape[-2:]) == (3, 3)
    size = _image_size(state)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    nearest: tuple[tuple, str] = ((False, 0.0), "")
    for name in named + rest:
        for small_stem in (True, False) if small else (False,):
            wanted, head = _backbone_shapes(name, size, small_stem, name in named)
            found = {key: shape for key, shape in shapes.items() if not key.startswith(head)}
            if not wanted:
                continue
            if wanted == found:
                encoder = build_encoder(name, 1, image_size=size, small_stem=small_stem)
                encoder.arch, encoder.small_stem = name, small_stem
                encoder.feature_dim = get_head(encoder).in_features
                return encoder
            shared = len(wanted.items() & found.items()) / len(wanted.keys() | found.keys())
            nearest = max(nearest, ((name in named, shared), _misfit(name, wanted, found)))
    said = f"; it says arch {arch!r}" if arch else ""
    raise CheckpointError(
        f"{path}: no known architecture has these {len(state)} tensors (first "
        f"{next(iter(state))}){said}{nearest[1]}"
    )


# Beginnings of names in torchvision's networks other than ResNets.
_OTHER_ARCHS = ("conv_proj.", "features.", "layers.", "stage2.", "stem.")


@functools.lru_cache(maxsize=1024)
def _backbone_shapes(
    arch: str, image_size: int, small_stem: bool, named: bool
) -> tuple[dict[str, tuple], str]:
    """Names and shapes of an encoder without its head, and how the head's names begin; ({}, "")
    where there is no such encoder."""
    # RegNets compute their widths with tensors, which "meta" has none of; they are found when the
    # file names them.
    try:
        with torch.device("cpu" if named and arch.startswith("regnet") else "meta"):
            encoder = build_encoder(arch, 1, image_size=image_size, small_stem=small_stem)
    except (ValueError, NotImplementedError):  # no such stem, size or head; RegNet
        return {}, ""
    head = f"{head_name(encoder)}."
    state = encoder.state_dict()
    return {key: tuple(t.shape) for key, t in state.items() if not key.startswith(head)}, head


def _image_size(state: dict[str, Tensor]) -> int:
    """A ViT's size is in its position embedding; other networks take any size."""
    patches = state.get("conv_proj.weight")
    for key, value in state.items():
        if key.endswith("pos_embedding") and patches is not None and patches.dim() == 4:
            if value.dim() == 3 and value.numel():
                return round((value.shape[1] - 1) ** 0.5) * patches.shape[-1]
    return 224


def _misfit(arch: str, wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    """In what a file differs from the architecture that it names, or that is nearest."""
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    other = [
        f"{key} is {found[key]}, expected {wanted[key]}"
        for key in wanted
        if key in found and found[key] != wanted[key]
    ]
    parts = [
        f"{len(what)} {word} ({', '.join(what[:3])}{', ...' if len(what) > 3 else ''})"
        for word, what in (
            ("missing", missing), ("unexpected", unexpected), ("of another shape", other)
        )
        if what
    ]  # fmt: skip
    return f". Against {arch}: {'; '.join(parts)}"


def _head_kind(head: dict[str, Tensor], name: str, bias: bool) -> str:
    """What the file has at the end; `bias`: whether the last layer of this arch has one."""
    names = {key.removeprefix(f"{name}.") for key in head}
    last = {"weight", "bias"} if bias else {"weight"}
    if names == last:
        return "linear"
    if names == {"0.weight", "0.bias"} | {f"2.{part}" for part in last}:
        return "mlp"
    return "none"


def _check_head(head: str, kind: str, layout: str, path: str | os.PathLike) -> None:
    """A projection head lies in MoCo files, a linear classifier in the others."""
    wanted = "projection" if layout == "moco" else "linear"
    if kind == "none" or head != wanted:
        has = "no head" if kind == "none" else f"a {wanted} head"
        remedy = ' (head="none" gives features)'
        raise CheckpointError(f"{path} has {has}, {head} was asked for{remedy}")


def _head_like(
    head: dict[str, Tensor], name: str, kind: str, feature_dim: int, path: str | os.PathLike
) -> nn.Module:
    last = f"{name}.weight" if kind == "linear" else f"{name}.2.weight"
    shape = tuple(head[last].shape)
    if len(shape) != 2 or shape[1] != feature_dim or not shape[0]:
        raise CheckpointError(f"{path}: {last} is {shape}, expected (outputs, {feature_dim})")
    linear = nn.Linear(feature_dim, shape[0], bias=last.replace("weight", "bias") in head)
    return linear if kind == "linear" else ProjectionHead(feature_dim, linear)
