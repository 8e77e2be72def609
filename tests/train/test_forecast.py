"""The forecast of a run: the formula by hand, and against what a run on two processes sends."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from harness import STEPS, finish

from moco.train.forecast import Measured, fit, forecast, sent_bytes

# A device that takes 10 ms + 1 ms per image; 25 million parameters; loading is for nothing.
ONE = Measured(device="cuda", world=1, nodes=1, batch=256, steps={256: 0.266, 128: 0.138},
               load_rate=1e9, overlaps=True, gradient_bytes=100_000_000, image_size=100,
               dim=128)  # fmt: skip


def test_the_line_through_the_times_has_no_negative_part() -> None:
    images = [4, 8, 32, 128]
    assert fit(images, [0.02 + 0.003 * n for n in images]) == pytest.approx((0.02, 3e-3))
    a, b = fit([2, 4, 8], [1.0, 3.0, 7.0])  # -1 + n
    assert a == 0 and 0.5 < b < 1
    a, b = fit([2, 4, 8], [3.0, 2.0, 1.0])
    assert b == 0 and 1 <= a < 3


def test_a_step_by_hand() -> None:
    now, eight = forecast(ONE), forecast(ONE, 8)
    assert now.seconds == now.compute == pytest.approx(0.266) and now.limit == "computing"
    assert eight.seconds == pytest.approx(0.010 + 0.032) and eight.network == 0
    slow = replace(ONE, load_rate=640)  # 0.4 s for 256 images
    assert forecast(slow).seconds == pytest.approx(0.4) and forecast(slow).limit == "loading"
    assert forecast(slow, 8).loading == pytest.approx(0.05)  # each node brings its loaders
    beside = forecast(replace(slow, overlaps=False))
    assert beside.seconds == pytest.approx(0.4 + 0.266)


def test_the_network_by_hand() -> None:
    sent = sent_bytes(replace(ONE, batch=128), 4)
    assert sent["all_reduce"] == 150e6  # 2 * 3/4 of the gradients
    assert sent["shuffle"] == 24 * 30_000  # 3/4 of 32 images of 3 * 100 * 100 bytes
    assert sent["gather"] == 96 * 512  # 32 keys of three others, 128 floats each
    others = 28 * 30_000 + 7 * 32 * 512  # bytes that nothing hides, 8 processes
    eight = replace(ONE, world=8, batch=256, steps={32: 0.0}, bandwidth=10e9)
    short = replace(eight, steps={32: 0.042 + others / 10e9})
    found = forecast(short)  # 175 MB in 17.5 ms, 21 ms of backward pass
    assert found.seconds == pytest.approx(0.042 + others / 10e9, rel=1e-3)
    assert found.network == pytest.approx(others / 10e9)
    on_cpu = forecast(replace(short, device="cpu", steps={32: 0.1}))
    assert on_cpu.seconds == pytest.approx(0.1)  # as it was measured
    assert on_cpu.network == pytest.approx(0.0175 + others / 10e9)
    slow = forecast(replace(short, bandwidth=1e9, device="cpu", steps={32: 0.2}))
    assert slow.limit == "network"


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
def counted_gather(output, input, group=None):
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
    # resnet8 with an MLP head of 32 outputs: stem, three stages with their shortcuts, two layers.
    size = 4 * (464 + 4672 + 14528 + 57728 + 64 * 65 + 65 * 32)
    expected = sent_bytes(replace(ONE, batch=16, gradient_bytes=size, image_size=16, dim=32), 2)
    assert seen["all_reduce"] == STEPS * expected["all_reduce"]
    assert seen["gather"] == STEPS * expected["gather"]
    # Which rows change rank is drawn: 4 of 8 on average.
    assert seen["shuffle"] == pytest.approx(STEPS * expected["shuffle"], rel=0.25)
