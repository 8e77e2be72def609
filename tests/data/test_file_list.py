"""Lists of millions of names and numbers: which sequences they are, and that they are shared."""

from __future__ import annotations

import gc
import hashlib
import os
import pickle
import re
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch.multiprocessing  # noqa: F401  (how tensors are handed to a process)
from helpers import write_images

from moco.data.file_list import Names, Numbers
from moco.data.images import FolderImages, Subset, names_digest
from moco.errors import DataError

NAMES = ["a/1.png", "b\udcff/ö.png", "", "c\n.png"]


def test_names_are_a_sequence_of_strings() -> None:
    names = Names([NAMES[:3], [], NAMES[3:]], prefix="root/")
    whole = [f"root/{name}" for name in NAMES]
    assert list(names) == whole == [names[i] for i in range(4)] == [names[i - 4] for i in range(4)]
    assert names == whole and whole == names and names != whole[1:] and len(names) == 4
    assert names[1:3] == whole[1:3] and names.index(whole[3]) == 3
    assert names.without_prefix() == NAMES
    for outside in (4, -5):
        with pytest.raises(IndexError):
            names[outside]
    empty = Names([])
    assert not empty and list(empty) == [] and empty.without_prefix() == []
    with pytest.raises(DataError, match="NUL"):
        Names([["a\0b"]])


def test_numbers_are_a_sequence_of_ints() -> None:
    values = [3, 0, -1, 2**62]
    numbers = Numbers(iter(values))
    assert numbers == values and list(numbers) == values and numbers[1:] == values[1:]
    assert [type(number) for number in (numbers[0], *numbers)] == [int] * 5
    assert numbers.count(3) == 1 and numbers != [3] and len(Numbers([])) == 0


def test_the_digest_is_that_of_the_list_of_names(tmp_path: Path) -> None:
    """As args.json of all earlier versions holds it."""
    write_images(tmp_path, {"b": 2, "a/é": 1, "a": 1})
    os.rename(tmp_path / "b" / "000.png", os.fsencode(tmp_path / "b") + b"/\xff\n.png")
    images = FolderImages(tmp_path)
    names = [os.path.relpath(path, tmp_path) for path in images.paths]
    assert sorted(names) == names and len(names) == 4
    for some, indices in ((images, []), (Subset(images, [2, 0]), [[2, 0]])):
        wanted = hashlib.sha256(repr((names, indices)).encode()).hexdigest()[:12]
        assert names_digest(some) == wanted


def owned() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(1024 * int(kb) for kb in re.findall(r"Private_\w+:\s+(\d+) kB", text))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux")
def test_a_process_that_looks_at_all_of_them_copies_none() -> None:
    count = 240_000
    texts = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(count)]
    lists = {"list": texts, "ours": Names([texts])}
    numbers = Numbers(range(count))
    grown = {}
    for name, names in lists.items():
        read, write = os.pipe()
        if not os.fork():
            gc.disable()  # a collection writes to the head of every object that it looks at
            owned()  # the first call makes what later ones have
            before = owned()
            for i in range(count):
                assert names[i] and numbers[i] >= 0
            os.write(write, str(owned() - before).encode())
            os._exit(0)
        os.close(write)
        os.wait()
        grown[name] = int(os.read(read, 100))
        os.close(read)
    assert grown["ours"] < 3 * 2**20 < 15 * 2**20 < grown["list"]


def test_a_spawned_process_is_handed_shared_memory() -> None:
    texts = [f"image {i}" for i in range(10_000)]
    names, numbers = Names([texts]), Numbers(range(10_000))
    assert len(bytes(ForkingPickler.dumps((names, numbers)))) < 5_000
    assert names == texts and numbers == range(10_000)  # what was shared may have moved
    assert pickle.loads(pickle.dumps((names, numbers))) == (names, numbers)
