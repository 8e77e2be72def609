"""Ctrl-C and requests to stop: main_lincls.py finishes the step, saves, and can be resumed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import Processes
from helpers import read_log
from probes import LATEST, MAIN, TINY, evaluate, load, result, unequal, words

import main_lincls
from moco.evaluate import knn
from moco.evaluate.heads import HeadTraining

MODES = {
    "standard": "--lr 1 --epochs 3",
    "cached heads": "--cached --cached-views 2 --lr 0.1,1 --wd 0,0.01 --epochs 3",
    "folds": "--lr 0.1,1 --epochs 2 --folds 2 -b 5",
    "finetune": "--finetune --lr 0.2 --lr-backbone 0.05 --epochs 3",
    "diverged": "--lr 1,1e38 --epochs 3",
}


def signal_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in its `step`-th step from now on."""
    take, steps = HeadTraining.step, []

    def step_and_signal(self: HeadTraining, losses: object) -> None:
        take(self, losses)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(HeadTraining, "step", step_and_signal)


@pytest.mark.parametrize(
    ("mode", "step", "number", "status"),
    [
        ("standard", 2, signal.SIGINT, 130),  # of three in an epoch
        ("cached heads", 3, signal.SIGTERM, 75),
        ("folds", 5, signal.SIGHUP, 75),
        ("finetune", 5, signal.SIGINT, 130),
        ("diverged", 2, signal.SIGTERM, 75),
    ],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    data, pretrained, monkeypatch, capsys, mode, step, number, status
):
    """Even without its seed and the encoder on the command line; what killed ones left goes."""
    flags, source = [MODES[mode], "--print-freq 3"], ["--pretrained", pretrained]
    evaluate(data, *flags, *source, "--save-dir whole")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as context, pytest.raises(SystemExit) as stopped:
        signal_at(step, number, context)
        evaluate(data, *flags, *source, "--save-dir cut")
    assert stopped.value.code == status
    assert before == {number: signal.getsignal(number) for number in before}
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(f"stopped by {signal.Signals(number).name} in ")
    assert last.endswith("go on with --save-dir cut --resume auto")
    assert not Path("cut/lincls.json").exists()
    assert load(f"cut/{LATEST}")["args"]["steps_done"] == step
    for left in (f".{LATEST}.123.tmp", ".lincls.json.0123abcd.tmp", ".args.json.tmp"):
        Path("cut", left).write_bytes(b"of a process that was killed")
    argv = [*TINY[:-2], *words(*flags), "--save-dir", "cut", "--resume", "auto", str(data)]
    main_lincls.main(argv)
    assert not list(Path("cut").glob("*.tmp"))
    assert unequal("whole", "cut") == []
    assert result("cut") == {**result("whole"), "checkpoint": f"cut/{LATEST}"}
    for kind in ("lincls", "held_out", "val"):
        whole, cut = (
            [
                {k: v for k, v in line.items() if k not in ("time", "images_per_s", "data_share")}
                for line in read_log(Path(name), kind)
            ]
            for name in ("whole", "cut")
        )
        assert whole == cut


def test_nan_that_no_line_has_shown_yet_is_not_saved(data, pretrained, monkeypatch, refused):
    signal_at(2, signal.SIGTERM, monkeypatch)
    flags = "--finetune --lr-backbone 1e30 --print-freq 3 --save-dir r --pretrained"
    assert "not finite in epoch 0, step 2" in refused(data, flags, pretrained)
    assert not Path("r", LATEST).exists()


def test_a_request_in_the_last_step_changes_nothing(data, pretrained, monkeypatch):
    signal_at(9, signal.SIGINT, monkeypatch)
    evaluate(data, "--lr 1 --epochs 3 --save-dir r --pretrained", pretrained)
    assert result("r")["last"]["epoch"] == 2


SLEEP = """
import os, signal, time
from moco.evaluate import heads, knn
def interrupted(*_, **__):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
    time.sleep(60)
"""


@pytest.mark.long
@pytest.mark.parametrize("where", ["heads.HeadTraining.step", "knn.F.normalize"])
def test_ctrl_c_at_once_is_one_line(data, pretrained, tmp_path, where):
    """The second one while classifiers train; the first elsewhere, where nothing is half done."""
    argv = [*TINY, "--knn", "--lr", 1, "--epochs", 3, "--pretrained", pretrained]
    process = Processes(tmp_path / "out", *argv, "--save-dir", tmp_path / "r", data, code=MAIN,
                        before=f"{SLEEP}\n{where} = interrupted")  # fmt: skip
    assert process.wait() == [130], process.output()
    lines = process.output().strip().splitlines()
    assert lines[-1] == "main_lincls.py: interrupted" and "Traceback" not in process.output()
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "r" / "lincls.json").exists()


@pytest.mark.long
def test_ctrl_c_in_a_terminal_reaches_all_processes(data, pretrained, tmp_path):
    """Loader processes too, which have to live until the step and the evaluation are done."""
    argv = [*TINY, "-j", 2, "--lr", 1, "--epochs", 1000, "--print-freq", 1]
    argv += ["--pretrained", pretrained, "--save-dir", tmp_path / "r", data]
    run = Processes(tmp_path / "out", *argv, count=2, code=MAIN)
    log = tmp_path / "r" / "log.jsonl"
    run.wait_until(lambda: log.exists() and log.read_text().count("lincls") >= 5)
    run.kill(signal.SIGINT)
    assert run.wait() == [130, 130], run.output()
    assert "Traceback" not in run.output()
    assert "stopped by SIGINT in epoch" in run.output(0)
    assert load(tmp_path / "r" / LATEST)["args"]["steps_done"] >= 5


@pytest.mark.long
def test_on_a_gpu_ranks_hear_it_by_time_whatever_is_printed(data, pretrained, tmp_path):
    """Patched in: to look waits for the device, and a second is four steps. Rank 1 is asked in step
    5 of an epoch of 15."""
    as_on_a_gpu = """
import os, signal
from moco.evaluate import heads, loop
loop.looking_waits = lambda device: True
loop.Looks.steps_ahead = lambda self, step: 4
take, done = heads.HeadTraining.step, []
def step(self, losses):
    take(self, losses)
    done.append(1)
    if len(done) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
heads.HeadTraining.step = step
"""
    argv = [*TINY, "-b", 2, "--lr", 1, "--epochs", 3, "--print-freq", 1000, "--pretrained"]
    argv += [pretrained, "--save-dir", tmp_path / "r", data]
    run = Processes(tmp_path / "out", *argv, count=2, code=MAIN, before=as_on_a_gpu)
    assert run.wait() == [75, 75], run.output()
    assert load(tmp_path / "r" / LATEST)["args"]["steps_done"] == 8


ALONE = """
import os
from moco.data.images import FolderImages
from moco.evaluate import knn, linear
def fails(*_, **__):
    raise OSError(5, "a fault of one rank alone")
"""
ON_RANK_1 = 'if os.environ["RANK"] == "1": '


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        (f"{ON_RANK_1}FolderImages.load = fails", 1),
        (f"{ON_RANK_1}linear.head_accuracy = fails", 1),
        ("linear.ClassifierWriter.write = fails", 0),  # of the last epoch: the others are done
    ],
)
def test_a_fault_of_one_rank_is_a_line_on_every_rank(fault, rank, data, pretrained, tmp_path):
    """None hangs, or ends as if all were well."""
    argv = [*TINY, "--lr", 1, "--epochs", 1, "--knn", "--pretrained", pretrained]
    argv += ["--save-dir", tmp_path / "r", "--timeout-minutes", 0.5, data]
    run = Processes(tmp_path / "out", *argv, count=2, code=MAIN, before=ALONE + fault)
    assert run.wait() == [1, 1], run.output()
    assert "Traceback" not in run.output()
    assert "a fault of one rank alone" in run.output(rank).splitlines()[-1]
    last = run.output(1 - rank).splitlines()[-1]
    assert f"rank {1 - rank} could not talk to the others; no answer from rank {rank}" in last


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 9 bytes")])
def test_memory_that_is_not_there_is_one_line(error, data, pretrained, monkeypatch, refused):
    monkeypatch.setattr(HeadTraining, "step", mock.Mock(side_effect=error))
    line = refused(data, "--lr 1 --epochs 1 --save-dir r --pretrained", pretrained)
    assert "error: out of memory; choose a smaller batch" in line


def test_memory_that_k_nn_lacks_is_one_line(data, pretrained, monkeypatch, refused):
    lacking = mock.Mock(side_effect=torch.OutOfMemoryError("9 bytes"))
    monkeypatch.setattr(knn, "knn_predict", lacking)
    line = refused(data, "--knn --epochs 0 --save-dir r --pretrained", pretrained)
    assert "error: out of memory for k-NN among 30 images, take fewer: 9 bytes" in line
