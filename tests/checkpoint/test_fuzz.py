"""Damaged files have two outcomes, the right result or a documented error: never a crash, a hang or
a silent wrong load. Mutations are functions of (kind, seed); to repeat one that failed:

    python tests/checkpoint/test_fuzz.py KIND SEED

They run in a process of their own, so that a crash or a hang is caught and named too.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for `python tests/checkpoint/test_fuzz.py`

from networks import make_moco, resnet8, under, write_arrays  # noqa: E402

from moco import checkpoint, encoders  # noqa: E402
from moco.data.images import load_rgb  # noqa: E402
from moco.errors import CheckpointError, DataError  # noqa: E402

MOST_SECONDS = 5.0  # of CPU, so that a busy machine does not fail the test
PATIENCE = 60.0  # seconds until a process that does not answer is taken for hung


# ---- Valid files ---------------------------------------------------------------------------------


def encoder() -> torch.nn.Module:
    return resnet8(10)  # running averages as after training, not all zeros and ones


def pretraining() -> dict:
    """A small pretraining checkpoint with everything that a real one has."""
    moco = make_moco(functools.partial(encoders.build_encoder, "resnet8"), mlp=True)
    optimizer = torch.optim.SGD(moco.parameters(), 0.1, momentum=0.9)
    for parameter in moco.encoder_q.parameters():
        parameter.grad = torch.randn_like(parameter)
    state = {name: tensor.clone() for name, tensor in moco.state_dict().items()}
    optimizer.step()
    return {
        "version": checkpoint.FORMAT_VERSION,
        "arch": "resnet8",
        "epoch": 3,
        "step": 30,
        "step_in_epoch": 0,
        "state_dict": under("module.", state),
        "optimizer": optimizer.state_dict(),
        "scaler": None,
        "rng": torch.get_rng_state().unsqueeze(0),
        "means": {"sums": {"loss": torch.tensor(float("inf"))}, "counts": {"loss": 2}},
        "args": {"arch": "resnet8", "objective": "1 * align", "image_size": 32},
    }


def lincls() -> dict:
    state = under("module.", encoder().state_dict())
    return {"arch": "resnet8", "epoch": 2, "best_acc1": torch.tensor(7.0), "state_dict": state}


def write_legacy(path: Path, content: dict) -> None:
    """Torch's format before 1.6. Torch itself still writes it, but names the storages by their
    addresses: its files differ between processes, and a mutation could not be repeated."""
    storages: dict[int, torch.storage.TypedStorage] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> tuple | None:
            if not isinstance(value, torch.storage.TypedStorage):
                return None
            storages.setdefault(value._cdata, value)
            number = list(storages).index(value._cdata)
            kind = getattr(torch, value._pickle_storage_type())
            return ("storage", kind, f"{number}", "cpu", value._size(), None)

    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    with open(path, "wb") as file:
        for value in (torch.serialization.MAGIC_NUMBER, 1001, system):
            pickle.dump(value, file, protocol=2)
        Pickler(file, protocol=2).dump(content)
        pickle.dump([f"{number}" for number in range(len(storages))], file, protocol=2)
        file.flush()
        for storage in storages.values():
            storage._untyped_storage._write_file(
                file, True, True, torch._utils._element_size(storage.dtype)
            )


def state_dict() -> dict:
    return dict(encoder().state_dict())


def save(path: Path, content: dict) -> None:
    torch.save(content, path)


def write_safetensors(path: Path, state: dict) -> None:
    checkpoint.write_safetensors(path, state, {"arch": "resnet8", "args": {"lr": 0.1}})


class Kind(NamedTuple):
    content: Callable[[], dict]
    write: Callable[[Path, dict], object]
    head: str = "none"  # that is asked for
    suffix: str = ".pth.tar"
    by_value: bool = True  # values are mutated too, and saved by torch
    announced: bool = False  # no checksums: other numbers can be read, and the load says so


CHECKPOINTS = {
    "ours": Kind(pretraining, checkpoint.write_checkpoint),
    "upstream": Kind(pretraining, save, head="projection"),
    "lincls": Kind(lincls, checkpoint.write_checkpoint, head="linear"),
    "plain": Kind(state_dict, save),
    "legacy": Kind(pretraining, write_legacy, announced=True),
    "safetensors": Kind(state_dict, write_safetensors, suffix=".safetensors", by_value=False),
    "foreign": Kind(state_dict, lambda path, state: save_file(state, path), suffix=".safetensors",
                    by_value=False, announced=True),
    "arrays": Kind(state_dict, write_arrays, suffix=".pkl", by_value=False, announced=True),
}  # fmt: skip


def jpegs() -> list[bytes]:
    """JPEGs of every sort that Pillow writes."""
    rng = np.random.default_rng(0)
    grid = np.add.outer(np.arange(60), np.arange(80))[..., None] * np.array([1, 2, 3])
    colour = Image.fromarray((grid + rng.integers(0, 40, grid.shape)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for image, options in (
        (colour, {}),
        (colour, {"progressive": True}),
        (colour, {"subsampling": 0, "quality": 95}),
        (colour, {"optimize": True, "restart_marker_blocks": 2}),
        (colour, {"exif": exif, "comment": b"a comment", "dpi": (72, 72)}),
        (colour.convert("L"), {}),
        (colour.convert("CMYK"), {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    return files


class Originals:
    """The valid files, and what is right for each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes, self.outputs = {}, {}
        for name, kind in CHECKPOINTS.items():
            path = folder / f"original{kind.suffix}"
            kind.write(path, kind.content())
            self.bytes[name] = path.read_bytes()
            self.outputs[name] = output(path, name)
        self.jpegs = jpegs()


def output(path: Path, kind: str) -> torch.Tensor:
    """What the encoder in a file makes of a fixed input."""
    net, _ = checkpoint.load_encoder(path, head=CHECKPOINTS[kind].head)
    images = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        return net(images)


# ---- Mutations -----------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage of a disk, a network or a text-mode copy."""
    place = rng.choice(("anywhere", "start", "end"))  # headers, directories and pickles lie there
    near = len(data) if place == "anywhere" else min(len(data), 20_000)
    at, other = rng.randrange(near), rng.randrange(near)
    if place == "end":
        at, other = len(data) - 1 - at, len(data) - 1 - other
    size = rng.choice((1, 8, 64, 700, 5000))
    part = data[at : at + size]
    old, new = {
        "bit": (data[at : at + 1], bytes([data[at] ^ 1 << rng.randrange(8)])),
        "noise": (part, rng.randbytes(len(part))),
        "zero": (part, bytes(len(part))),
        "copy": (part, data[other : other + len(part)]),
        "cut": (part, b""),
        "truncate": (data[at:], b""),
        "double": (b"", part),
        "insert": (b"", rng.randbytes(size)),
        "append": (data[at:], data[at:] + rng.randbytes(size)),
    }[name := rng.choice(MUTATIONS)]
    return f"{name} at the {place}", data[:at] + new + data[at + len(old) :]


MUTATIONS = ("bit", "noise", "zero", "copy", "cut", "truncate", "double", "insert", "append")


def mutate_values(content: dict, rng: random.Random) -> str:
    """Change one value of nested dicts in place; what is left is a valid file of other content."""
    parent, path = content, []
    while True:
        key = rng.choice(list(parent))
        path.append(str(key))
        if not (isinstance(parent[key], dict) and parent[key] and rng.random() < 0.9):
            break
        parent = parent[key]
    value = parent[key]
    ways = ["drop", "rename", "none", "text", "number", "list", "dict"]
    if isinstance(value, torch.Tensor):
        ways += 2 * ["flat", "longer", "scalar", "empty", "nan", "integer", "complex", "double"]
    name = rng.choice(ways)
    if name == "drop":
        del parent[key]
    elif name == "rename":
        parent[f"{key}x"] = parent.pop(key)
    elif name == "nan" and value.is_floating_point() and value.numel():
        parent[key] = value.clone()
        number = rng.choice((float("nan"), float("inf")))
        parent[key].view(-1)[rng.randrange(value.numel())] = number
    else:
        parent[key] = {
            "none": lambda: None,
            "text": lambda: "text",
            "number": lambda: -1,
            "list": lambda: [value, value],
            "dict": lambda: {"a": value},
            "flat": lambda: value.reshape(1, -1),
            "longer": lambda: torch.cat([value.reshape(-1), value.reshape(-1)[:1]]),
            "scalar": lambda: torch.tensor(0.5),
            "empty": lambda: torch.empty(0, *value.shape),
            "nan": lambda: value,
            "integer": lambda: value.to(torch.int16),
            "complex": lambda: value.to(torch.complex64),
            "double": lambda: value.double(),
        }[name]()
    return f"{name} of {'.'.join(path)}"


def run_checkpoint(originals: Originals, kind: str, seed: int) -> tuple[str, str]:
    """(outcome, what was done) for a mutated checkpoint."""
    rng = random.Random(f"{kind} {seed}")
    path = originals.folder / f"mutated{CHECKPOINTS[kind].suffix}"
    by_bytes = rng.random() < 0.5 or not CHECKPOINTS[kind].by_value
    kept_checksum = False
    if by_bytes:
        done, data = mutate_bytes(originals.bytes[kind], rng)
        path.write_bytes(data)
    else:
        content = torch.load(io.BytesIO(originals.bytes[kind]), weights_only=True)
        kept_checksum = "checksum" in content and rng.random() < 0.3
        if not kept_checksum:
            content.pop("checksum", None)
        done = mutate_values(content, rng)
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            found = output(path, kind)
        except (CheckpointError, FileNotFoundError) as error:
            said = str(error)
            assert str(path) in said and "\n" not in said and len(said) < 1500, said
            return "refused", f"{done}: {said}"
    if torch.equal(found, originals.outputs[kind]):
        return "right", done
    said_so = any("only its structure" in str(warning.message) for warning in warned)
    if CHECKPOINTS[kind].announced and by_bytes and said_so:
        return "other numbers, announced", done
    return "WRONG", f"{done}, checksum kept: {kept_checksum}"


def run_jpeg(originals: Originals, seed: int) -> tuple[str, str]:
    rng = random.Random(f"jpeg {seed}")
    done, data = mutate_bytes(rng.choice(originals.jpegs), rng)
    path = originals.folder / "mutated.jpg"
    path.write_bytes(data)
    try:
        image = load_rgb(path)
    except DataError as error:
        assert str(path) in str(error)
        return "refused", f"{done}: {error}"
    assert image.mode == "RGB" and image.getpixel((image.width - 1, image.height - 1))
    return "right", done


# ---- In a process of their own -------------------------------------------------------------------


@functools.cache
def originals_in(folder: Path) -> Originals:
    torch.set_num_threads(1)
    return Originals(folder)


def run(folder: Path, kind: str, seed: int) -> tuple[str, str]:
    originals = originals_in(folder)
    started = time.process_time()
    try:
        if kind == "jpeg":
            outcome, done = run_jpeg(originals, seed)
        else:
            outcome, done = run_checkpoint(originals, kind, seed)
    except Exception as error:  # any other exception is a finding
        outcome, done = "UNDOCUMENTED", f"{type(error).__name__}: {error}"
    seconds = time.process_time() - started
    return (outcome if seconds <= MOST_SECONDS else f"SLOW ({seconds:.1f} s)"), done


class Server:
    """A process that runs mutations, and a new one where it ended or hangs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, originals_in, (self.folder,))
        self.pid = self.pool.submit(os.getpid).result()

    def run(self, kind: str, seed: int) -> tuple[str, str]:
        try:
            return self.pool.submit(run, self.folder, kind, seed).result(PATIENCE)
        except (BrokenExecutor, TimeoutError) as error:
            self.stop()
            self.start()
            return "HUNG" if isinstance(error, TimeoutError) else "CRASHED", ""

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.pool.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("fuzz"))
    yield server
    server.stop()


ALLOWED = {"right", "refused", "other numbers, announced"}


MANY = {"ours": 120, "upstream": 120, "lincls": 80, "plain": 80, "legacy": 80, "safetensors": 120,
        "foreign": 120, "arrays": 120, "jpeg": 150}  # fmt: skip
FEW = 40


@pytest.mark.parametrize(
    ("kind", "seeds"),
    [
        *(pytest.param(kind, range(FEW), id=kind) for kind in MANY),
        *(
            pytest.param(kind, range(FEW, count), id=f"more {kind}", marks=pytest.mark.long)
            for kind, count in MANY.items()
        ),
    ],
)
def test_mutations_are_refused_or_read_right(server: Server, kind: str, seeds: range) -> None:
    outcomes: Counter = Counter()
    failed = []
    for seed in seeds:
        outcome, done = server.run(kind, seed)
        outcomes[outcome] += 1
        if outcome not in ALLOWED:
            failed.append(f"python tests/checkpoint/test_fuzz.py {kind} {seed}   {outcome}: {done}")
    print(f"{kind}: {dict(outcomes)}")
    assert not failed, "\n".join([f"{len(failed)} of {len(seeds)} mutations:", *failed[:20]])
    assert outcomes["refused"] >= len(seeds) // 20, "the mutations do no harm"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(*run(Path(folder), sys.argv[1], int(sys.argv[2])), sep=": ")
