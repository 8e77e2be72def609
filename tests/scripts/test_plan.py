"""scripts/plan.py: the formula by hand and against what is sent, and the commands."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from harness import STEPS, Processes, finish
from helpers import ROOT, refusal

sys.path.insert(0, str(ROOT / "scripts"))
import plan  # noqa: E402

# A device that takes 10 ms + 1 ms per image; 25 million parameters, 10 ms for a pair of views.
SETTINGS = {"arch": "resnet18", "image_size": 100, "small_stem": False, "moco_dim": 128,
            "moco_k": 65536, "mlp": True, "amp": "off", "aug_plus": False}  # fmt: skip
MEASURED = {"settings": SETTINGS, "device": "cuda", "images": [8, 16, 64],
            "seconds": [0.018, 0.026, 0.074], "gradient_bytes": 100e6,
            "pair_seconds": 0.010}  # fmt: skip
FLAGS = ["-a", "resnet18", "--image-size", "100", "--mlp"]


def predicted(*flags: object, **changed: object) -> dict:
    args = plan.build_parser().parse_args([*FLAGS, *map(str, flags)])
    return plan.predict({**MEASURED, **changed}, args)


def test_the_line_through_the_times_has_no_negative_part() -> None:
    images = [4, 8, 32, 128]
    assert plan.fit(images, [0.02 + 0.003 * n for n in images]) == pytest.approx((0.02, 3e-3))
    a, b = plan.fit([2, 4, 8], [1.0, 3.0, 7.0])  # -1 + n
    assert a == 0 and 0.5 < b < 1
    a, b = plan.fit([2, 4, 8], [3.0, 2.0, 1.0])
    assert b == 0 and 1 <= a < 3


def test_a_step_by_hand() -> None:
    fast = predicted("--intra-gbs", 1e6, "--cores", 64)
    assert fast["step_seconds"] == pytest.approx(0.042, rel=1e-3)
    assert fast["images_per_s"] == pytest.approx(256 / 0.042, rel=1e-3)
    assert fast["cores_per_node"] == pytest.approx(256 * 0.010 / 0.042, rel=1e-3)
    assert fast["hours"] == pytest.approx(200 * 5004 * 0.042 / 3600, rel=1e-3)
    slow = predicted("--intra-gbs", 1e6, "--cores", 32)  # 256 pairs of 10 ms on 32 cores
    assert slow["step_seconds"] == pytest.approx(0.080)


def test_the_network_by_hand() -> None:
    """Bytes of four GPUs; then two nodes of eight, 100 within and 10 between: a ring has 80."""
    four = predicted("--gpus", 4, "-b", 128)
    assert four["all_reduce_bytes"] == 150e6  # 2 * 3/4 of the gradients
    assert four["shuffle_bytes"] == 24 * 30_000  # 3/4 of 32 images of 3 * 100 * 100 bytes
    assert four["gather_bytes"] == 96 * 512  # 32 keys of three others, 128 floats each
    two = predicted("--nodes", 2, "--intra-gbs", 100, "--inter-gbs", 10)
    assert two["all_reduce_seconds"] == pytest.approx(187.5e6 / 80e9)
    assert two["shuffle_seconds"] == pytest.approx(8 * 30_000 / 10e9)  # half of 16 change node
    assert two["gather_seconds"] == pytest.approx(15 * 16 * 512 / 80e9)
    assert predicted("--gpus", 1, "-b", 64)["network_not_hidden_seconds"] == 0


def test_a_gpu_hides_the_all_reduce_behind_half_of_its_computing() -> None:
    others = 28 * 30_000 + 7 * 32 * 512  # bytes that are not hidden
    short = predicted("--intra-gbs", 10)  # 175 MB in 17.5 ms, 21 ms of backward pass
    assert short["network_not_hidden_seconds"] == pytest.approx(others / 10e9)
    long = predicted("--intra-gbs", 1)
    assert long["network_not_hidden_seconds"] == pytest.approx(0.175 - 0.021 + others / 1e9)
    on_cpu = predicted("--intra-gbs", 10, device="cpu")
    assert on_cpu["network_not_hidden_seconds"] == pytest.approx(0.0175 + others / 10e9)


COUNTING = """
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from moco import distributed

def note(kind, size):
    print("sent", kind, size, flush=True)

exchange, gather = dist.all_to_all_single, getattr(dist, distributed._GATHER)
def counted_exchange(output, input, sizes, *more):
    row = output[0].numel() * output.element_size()
    note("shuffle", row * sum(s for r, s in enumerate(sizes) if r != dist.get_rank()))
    exchange(output, input, sizes, *more)
def counted_gather(output, input):
    if input.shape[1:] == (32,):  # keys
        note("gather", output.nbytes - input.nbytes)
    gather(output, input)
dist.all_to_all_single = counted_exchange
setattr(dist, distributed._GATHER, counted_gather)

def reduction(state, bucket):
    note("all_reduce", bucket.buffer().nbytes)
    work = dist.all_reduce(bucket.buffer() / 2, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
make = DistributedDataParallel.__init__
def with_hook(self, *args, **more):
    make(self, *args, **more)
    self.register_comm_hook(None, reduction)
DistributedDataParallel.__init__ = with_hook
"""


@pytest.mark.long
def test_the_bytes_are_those_of_a_run_on_two_processes(images, tmp_path) -> None:
    """Rows, keys and gradient buckets as they are handed to torch's collectives."""
    finish(tmp_path / "run", images, processes=2, before=COUNTING)
    said = (tmp_path / "run.out.0").read_text()
    seen = {"shuffle": 0, "gather": 0, "all_reduce": 0}
    for kind, size in re.findall(r"^sent (\w+) (\d+)$", said, re.M):
        seen[kind] += int(size)
    words = "-a resnet8 --image-size 16 -b 16 --gpus 2 --moco-dim 32 --moco-k 64 --mlp".split()
    args = plan.build_parser().parse_args(words)
    size = sum(4 * p.numel() for p in plan.encoder_of(args).parameters())
    expected = plan.predict({**MEASURED, "gradient_bytes": size}, args)
    assert seen["all_reduce"] == STEPS * expected["all_reduce_bytes"]
    assert seen["gather"] == STEPS * expected["gather_bytes"]
    # Which rows change rank is drawn: 4 of 8 on average.
    assert seen["shuffle"] == pytest.approx(STEPS * expected["shuffle_bytes"], rel=0.25)


@pytest.fixture
def forked(tmp_path, monkeypatch) -> None:
    """Runs of one process come from the server of the harness, which has imported torch."""
    run, lock, count = subprocess.run, threading.Lock(), itertools.count()

    def run_forked(command: list[str], **options: object) -> subprocess.CompletedProcess:
        if "torch.distributed.run" in command:
            return run(command, **options)
        with lock:
            process = Processes(tmp_path / f"out{next(count)}", *command[2:])
            (status,) = process.wait()
        return subprocess.CompletedProcess(command, status, process.output(), "")

    monkeypatch.setattr(plan.subprocess, "run", run_forked)


@pytest.mark.long
@pytest.mark.usefixtures("forked")
def test_measure_once_and_plan_often_and_check(tmp_path: Path, capsys) -> None:
    tiny = "-a resnet8 --image-size 16 --moco-k 64 --moco-dim 32 -b 16 --gpus 4 --device cpu"
    words, first, again = tiny.split(), tmp_path / "new" / "first.json", tmp_path / "again.json"
    plan.main([*words, "--out", str(first)])
    one = json.loads(first.read_text())
    # resnet8 with 32 outputs: stem, three stages with their shortcuts, linear layer.
    assert one["measured"]["gradient_bytes"] == 4 * (464 + 4672 + 14528 + 57728 + 2080)
    assert len(one["measured"]["seconds"]) == 3 and one["measured"]["pair_seconds"] > 0
    assert one["plan"]["images_per_gpu"] == 4 and "like this cpu" in capsys.readouterr().out
    plan.main([*words, "--measured", str(first), "--out", str(again)])
    assert json.loads(again.read_text()) == one
    status, line = refusal(plan.main, [*words, "--mlp", "--measured", again], capsys)
    assert status == 2 and "'mlp': False" in line and "'mlp': True" in line

    plan.main([*words, "--check", "--out", str(tmp_path / "check.json")])
    found = json.loads((tmp_path / "check.json").read_text())["check"]
    assert found["predicted"] > 0 < found["measured"]
    assert "2 processes:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("-a resnet51", "did you mean"),
        ("--gpus 0", "--gpus must be a positive number, got 0"),
        ("--cores -1", "--cores must be a positive number"),
        ("--inter-gbs nan", "--inter-gbs must be a positive number"),
        ("--gpus 3", "must be a multiple of 3"),
        ("--gpus 8 --nodes 32", "with at least two images for each; use 512"),
        ("--moco-k 128", "--moco-k must be at least one batch of 256"),
        ("-a vit_b_16 --image-size 50", "vit_b_16 with images of 50 pixels"),
        ("--measured nowhere.json", "holds no figures of this script"),
        ("--frobnicate", "unrecognized"),
    ],
)
def test_refused_at_once(flags: str, part: str, capsys) -> None:
    status, line = refusal(plan.main, flags.split(), capsys)
    assert status == 2 and part in line, line
