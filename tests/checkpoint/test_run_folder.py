"""Checkpoints of a run folder: their order, the newest that is whole, which ones are deleted."""

import errno
import os
from pathlib import Path

import pytest
import torch

from moco import checkpoint
from moco.checkpoint import (
    Retention,
    epoch_path,
    newest_valid,
    run_checkpoints,
    step_path,
    write_checkpoint,
)
from moco.errors import CheckpointError


def make_run(folder: Path, names: list[str]) -> None:
    """Small checkpoints in the order of their writing, and empty other files."""
    for second, name in enumerate(names):
        if name.startswith("checkpoint_0"):
            content = {"epoch": int(name[11:15]) + 1, "state_dict": {"a": torch.tensor([3.25])}}
            write_checkpoint(folder / name, content)
        else:
            (folder / name).touch()
        os.utime(folder / name, (1000 + second, 1000 + second))


def names(folder: Path) -> list[str]:
    return [path.name for path in run_checkpoints(folder)]


def prune(folder: Path, newest: str, *, keep_last: int, keep_every: int = 0) -> None:
    """As after a save of `newest`."""
    retention = Retention(folder, keep_last=keep_last, keep_every=keep_every)
    retention.written(folder / newest)
    retention.prune(folder / newest)


def epochs(*numbers: int) -> list[str]:
    return [f"checkpoint_{number:04d}.pth.tar" for number in numbers]


def test_file_names_are_the_published_ones(tmp_path):
    found = [epoch_path(tmp_path, 0), epoch_path(tmp_path, 12345), step_path(tmp_path, 70)]
    names = ["checkpoint_0000.pth.tar", "checkpoint_12345.pth.tar", "step_00000070.pth.tar"]
    assert found == [tmp_path / name for name in names]


def test_checkpoints_of_a_run_are_ordered_by_how_far_it_had_come(tmp_path):
    """Not by the times of the files, which a copied folder has anew. Seven steps make an epoch."""
    order = ["step_00000003.pth.tar", *epochs(0), "step_00000009.pth.tar", *epochs(1, 9, 12345)]
    for name in reversed(order):
        step = name.startswith("step") and int(name[5:13])
        write_checkpoint(tmp_path / name, {"epoch": step // 7, "step": step})
    assert names(tmp_path) == order
    # One that cannot be read may be the newest: it is tried first, and passed over with a word.
    (tmp_path / "step_00000009.pth.tar").write_bytes(b"cut off")
    assert names(tmp_path)[-1] == "step_00000009.pth.tar"
    said = []
    path, content = newest_valid(tmp_path, said.append)
    assert path.name == "checkpoint_12345.pth.tar" and content["epoch"] == 0
    assert len(said) == 1 and "step_00000009.pth.tar" in said[0]


def test_other_files_are_no_checkpoints_of_the_run(tmp_path):
    others = [
        "model_best.pth.tar",
        ".checkpoint_0001.pth.tar.77.tmp",
        "args.json",
        "checkpoint_1.pth.tar",
        "checkpoint_0001.pth",
        "old_checkpoint_0001.pth.tar",
    ]
    make_run(tmp_path, [*others, *epochs(2)])
    assert names(tmp_path) == epochs(2)
    assert run_checkpoints(tmp_path / "nowhere") == []


def test_prune_keeps_the_newest_and_every_mth_epoch(tmp_path):
    """Epoch 4 is the fifth: its number is 0-based. Steps are never kept for their number."""
    make_run(tmp_path, epochs(0, 1, 2, 3, 4, 5, 6, 7))
    write_checkpoint(tmp_path / "step_00000038.pth.tar", {"epoch": 5, "step": 38})
    (tmp_path / "model_best.pth.tar").touch()
    prune(tmp_path, *epochs(7), keep_last=2, keep_every=5)
    assert names(tmp_path) == epochs(4, 6, 7)
    assert (tmp_path / "model_best.pth.tar").exists()


# ---- Damaged ones --------------------------------------------------------------------------------


def tear(path: Path) -> None:
    """Cut a file in half, as a full disk or a crash of the machine leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rot(path: Path) -> None:
    """Change a number, which only the whole reading shows."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor([3.25]).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def not_finite(path: Path) -> None:
    write_checkpoint(path, {"epoch": 9, "state_dict": {"a": torch.tensor([float("nan")])}})


DAMAGES = {
    "torn": tear,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "rotten": rot,
    "not finite": not_finite,
    "another file": lambda path: path.write_text("<html>log in</html>"),
}


def resume(folder: Path) -> tuple[Path, list[str]]:
    said: list[str] = []
    path, _ = newest_valid(folder, said.append)
    return path, said


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("steps", [False, True], ids=["epochs", "steps"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
def test_no_good_checkpoint_is_lost_to_damaged_ones(
    damage: str, count: int, steps: bool, keep_last: int, tmp_path: Path
) -> None:
    """The newest are damaged; the run goes on from an older one, and its next files are older by
    name than the damaged ones."""
    make_run(tmp_path, epochs(0, 1, *range(5, 5 + count)))
    broken = [epoch_path(tmp_path, 5 + i) for i in range(count)]
    for path in broken:
        DAMAGES[damage](path)
    before = {path.name: path.read_bytes() for path in broken}
    resumed, said = resume(tmp_path)
    assert resumed.name == epochs(1)[0]
    assert len(said) == count
    for line, path in zip(said, reversed(broken), strict=True):
        assert line.startswith(f"passing over a checkpoint: {path}") and "\n" not in line
        assert f"it is now {path.name}.damaged" in line
        assert Path(f"{path}.damaged").read_bytes() == before[path.name]
    written = []
    retention = Retention(tmp_path, keep_last=keep_last, keep_every=0)
    retention.keep.add(resumed)
    for number in (2, 3, 4):
        path = step_path(tmp_path, 10 * number) if steps else epoch_path(tmp_path, number)
        write_checkpoint(path, {"epoch": number, "state_dict": {"a": torch.ones(2)}})
        written.append(path)
        retention.written(path)
        retention.prune(path)
        assert path.exists() and resumed.exists()
        assert resume(tmp_path) == (path, [])
    left = {resumed, *written[-keep_last:]}
    assert set(run_checkpoints(tmp_path)) == left


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "not finite"])
@pytest.mark.parametrize("steps", [False, True], ids=["epochs", "steps"])
def test_a_damaged_file_that_nobody_passed_over_takes_no_good_ones_place(
    steps: bool, damage: str, tmp_path: Path
) -> None:
    """It is neither counted nor deleted."""
    make_run(tmp_path, epochs(0, 1, 2, 3, 7))
    path = epoch_path(tmp_path, 7)
    DAMAGES[damage](path)
    if steps:
        path = path.rename(step_path(tmp_path, 99))
    prune(tmp_path, *epochs(3), keep_last=2)
    left = set(epochs(2, 3))
    assert set(names(tmp_path)) == left | {path.name}


def test_nothing_is_deleted_when_the_new_file_is_torn(tmp_path: Path) -> None:
    """As on a disk that says that all was written."""
    make_run(tmp_path, epochs(0, 1, 2))
    tear(epoch_path(tmp_path, 2))
    prune(tmp_path, *epochs(2), keep_last=1)
    assert names(tmp_path) == epochs(0, 1, 2)


def test_where_none_can_be_read_none_is_renamed(tmp_path: Path) -> None:
    """Else the next start would take the folder for a new one."""
    make_run(tmp_path, epochs(0, 1))
    for path in run_checkpoints(tmp_path):
        tear(path)
    for _ in range(2):
        said: list[str] = []
        with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* can be read"):
            newest_valid(tmp_path, said.append)
        assert len(said) == 2 and names(tmp_path) == epochs(0, 1)


@pytest.mark.parametrize("why", ["a newer version", "the disk"])
def test_what_may_be_good_keeps_its_name(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, epochs(0, 1))
    newer = {"version": checkpoint.FORMAT_VERSION + 1, "epoch": 2, "state_dict": {}}
    real = open

    def fails(path, *args, **kwargs):
        if str(path).endswith(epochs(1)[0]) and args[:1] == ("rb",):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *args, **kwargs)

    if why == "the disk":
        monkeypatch.setattr("builtins.open", fails)
    else:
        write_checkpoint(epoch_path(tmp_path, 1), newer)
    path, said = resume(tmp_path)
    assert path.name == epochs(0)[0] and sorted(os.listdir(tmp_path)) == epochs(0, 1)
    assert ("has format version" if why == "a newer version" else "Input/output er") in said[0]
    assert "it is now" not in said[0]


def test_damaged_files_of_one_name_are_all_kept(tmp_path: Path) -> None:
    make_run(tmp_path, epochs(0))
    for content in (b"first", b"second"):
        epoch_path(tmp_path, 1).write_bytes(content)
        resume(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.damaged*")}
    name = epochs(1)[0]
    assert kept == {f"{name}.damaged": b"first", f"{name}.damaged2": b"second"}
