"""What a GPU computes, against float64 and against the CPU: `pytest -m gpu` on a machine with one.

MOCO_GPU_TESTS=cpu runs the same tests on the CPU, all but those that are about the GPU itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import numpy as np
import pytest
import reference
import torch
from harness import final_state
from helpers import ROOT, differences, free_port, noise_image
from torch import nn
from torch.nn.functional import normalize

import main_moco
from align_uniform import align_loss, contrastive_loss, uniform_loss, uniform_loss_with_queue
from moco.batch_norm import SplitBatchNorm2d
from moco.data import loader
from moco.data.images import ArrayImages
from moco.data.samples import AugmentedViews
from moco.data.views import pretrain_recipe
from moco.evaluate.knn import knn_predict
from moco.precision import kernels
from moco.train import loop
from moco.train.step import train_step

pytestmark = [pytest.mark.gpu, pytest.mark.long]

RUN = shlex.split(
    "-a resnet8 --image-size 32 --batch-size 8 --group-size 4 --moco-k 64 --moco-dim 16 --mlp "
    "--aug-plus -j 0 -p 1 --seed 1 --lr 0.03"
)


@pytest.fixture
def device() -> torch.device:
    on_cpu = os.environ.get("MOCO_GPU_TESTS") == "cpu"
    return torch.device("cpu") if on_cpu else torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    """Matrix products in full precision, where NVIDIA's containers choose TF32."""
    with kernels(deterministic=False):
        yield


@pytest.fixture
def really_gpu(device) -> None:
    if device.type == "cpu":
        pytest.skip("about the GPU itself")


def train(device: torch.device, data: Path, run: Path, *flags: object) -> list[dict]:
    """A run in this process; the lines of its log, one a step."""
    place = ["--device", "cpu"] if device.type == "cpu" else ["--device", "cuda", "--gpus", "0"]
    main_moco.main([*RUN, *place, *map(str, flags), "--save-dir", str(run), str(data)])
    return [line for line in harness.log_lines(run) if line["kind"] == "train"]


def unit(*shape: int) -> torch.Tensor:
    return normalize(torch.randn(*shape), dim=1)


# ---- Parts ---------------------------------------------------------------------------------------

LOSSES = {
    "align": (lambda q, k, _: align_loss(q, k), lambda q, k, _: reference.align(q, k)),
    "uniform": (lambda q, *_: uniform_loss(q), lambda q, *_: reference.uniform(q)),
    "queue": (
        lambda q, _, queue: uniform_loss_with_queue(q, queue, 3),
        lambda q, _, queue: reference.uniform_with_queue(q, queue, 3),
    ),
    "InfoNCE": (
        lambda q, k, queue: contrastive_loss(q, k, queue, 0.2),
        lambda q, k, queue: reference.info_nce(q, k, queue, 0.2),
    ),
}


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_float64(name, half, device) -> None:
    """With a queue of more than one block; under autocast they stay in float32."""
    torch.manual_seed(0)
    q, k, keys = unit(24, 16), unit(24, 16), unit(20000, 16)
    loss, expected = LOSSES[name]
    wide = q.double().requires_grad_()
    wanted = expected(wide, k.double(), keys.t().double())
    wanted.backward()
    own = q.to(device).requires_grad_()
    with torch.autocast(device.type, half, enabled=half is not None):
        value = loss(own, k.to(device), keys.to(device).t())
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.cpu().double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.cpu().double(), wide.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_groups_of_batch_norm_are_those_of_float64(layout, device) -> None:
    """Output, gradients and running statistics."""
    torch.manual_seed(0)
    x, slope = torch.randn(2, 8, 6, 5, 5)
    split = SplitBatchNorm2d(6, 4).to(device)
    norms = [nn.BatchNorm2d(6).double() for _ in range(4)]
    wide = x.double().requires_grad_()
    wanted = torch.cat([norm(part) for norm, part in zip(norms, wide.chunk(4), strict=True)])
    (wanted * slope).sum().backward()
    own = x.to(device, memory_format=layout).requires_grad_()
    got = split(own)
    (got * slope.to(device)).sum().backward()
    assert got.is_contiguous(memory_format=layout)
    pairs = [
        (got, wanted),
        (own.grad, wide.grad),
        (split.weight.grad, sum(norm.weight.grad for norm in norms)),
        (split.running_var, torch.stack([norm.running_var for norm in norms]).mean(dim=0)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


def test_neighbours_vote_as_on_the_cpu(device) -> None:
    torch.manual_seed(0)
    features, bank, labels = unit(50, 16), unit(300, 16), torch.randint(0, 5, (300,))
    options = {"classes": 5, "k": 20, "block_size": 16}
    found = knn_predict(*(x.to(device) for x in (features, bank, labels)), **options)
    wanted = knn_predict(features.double(), bank.double(), labels, **options)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("resident", [False, True], ids=["workers", "resident"])
def test_views_of_the_device_are_pillows(resident, device, monkeypatch) -> None:
    """Of loader processes or of images on the device, in every batch of the epoch."""
    if not resident:
        monkeypatch.setattr(loader, "in_memory", lambda images: None)
    array = np.stack([np.asarray(noise_image(seed=i)) for i in range(24)])
    images = ArrayImages(array, [i % 3 for i in range(24)], ["a", "b", "c"])

    def epoch(on_device: bool, place: torch.device) -> list[tuple]:
        data = AugmentedViews(
            images, pretrain_recipe(32, aug_plus=True), seed=9, num_views=2,
            augment_on_device=on_device,
        )  # fmt: skip
        batches = loader.EpochBatches(24, 4, seed=3)
        pairs = loader.TrainLoader(data, batches, workers=2, device=place)
        try:
            return list(pairs)
        finally:
            pairs.end()

    by_pillow = epoch(False, torch.device("cpu"))
    for made, same in ((epoch(True, device), False), (epoch(False, device), True)):
        assert len(made) == len(by_pillow)
        for got, wanted in zip(made, by_pillow, strict=True):
            assert torch.equal(got[2], wanted[2])
            for view, expected in zip(got[:2], wanted[:2], strict=True):
                assert view.device.type == device.type
                apart = (view.cpu().int() - expected.int()).abs().float().mean()
                assert apart == 0 if same else apart < 0.75


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        ("--amp off", 2e-3),  # convolutions in TF32
        ("--amp off --channels-last", 2e-3),
        ("--amp bf16", 3e-2),
        ("--amp fp16", 1e-2),
        ("--amp bf16 --compile", 3e-2),
        ("--amp off --views device", 5e-2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_five_steps_learn_as_on_the_cpu_in_float32(
    flags, tolerance, data, device, tmp_path
) -> None:
    if "fp16" in flags and device.type == "cpu":
        pytest.skip("fp16 needs a GPU")
    five = ["--max-steps", "5", "--epochs", "2", "--knn-every", "0", "--lr", "0.003"]
    ours = train(device, data, tmp_path / "ours", *five, *flags.split())
    cpu = train(torch.device("cpu"), data, tmp_path / "cpu", *five)
    torch.compiler.reset()
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5]
    if "fp16" not in flags:  # which may leave steps out
        np.testing.assert_allclose(
            [line["loss"] for line in ours], [line["loss"] for line in cpu], atol=3 * tolerance
        )


def test_overflows_of_fp16_are_left_out(really_gpu, data, device, tmp_path, monkeypatch) -> None:
    """The first step's gradients overflow; the four after it train."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-52)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    lines = train(device, data, tmp_path / "run", "--max-steps", 5, "--epochs", 2, "--amp", "fp16")
    assert [line["overflows"] for line in lines] == [1] * 5
    for name, tensor in final_state(tmp_path / "run")["checkpoint"]["state_dict"].items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_resumed_run_is_the_same_bit_for_bit(amp, data, device, tmp_path) -> None:
    """With --deterministic, cut off in the middle of an epoch."""
    flags = ["--epochs", 2, "--deterministic", "--amp", amp]
    train(device, data, tmp_path / "whole", *flags)
    train(device, data, tmp_path / "cut", *flags, "--max-steps", 4)
    train(device, data, tmp_path / "cut", *flags, "--resume", "auto")
    resumed, whole = (final_state(tmp_path / name)["checkpoint"] for name in ("cut", "whole"))
    assert differences(resumed, whole) == []


def test_no_step_waits_for_the_gpu(really_gpu, data, device, tmp_path, monkeypatch) -> None:
    """By torch's own count, from the third step on; what is printed and saved waits between them,
    as every step is printed here."""
    waited = []

    def watched(task, model, state, guard, batch):
        strict = state.step >= 2  # kernels are chosen, and constants sent, in the first ones
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            return train_step(task, model, state, guard, batch)
        except RuntimeError as error:
            waited.append((state.step, str(error)))
            raise
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", watched)
    with contextlib.suppress(SystemExit, RuntimeError):
        train(device, data, tmp_path / "run", "--max-steps", 5, "--epochs", 2, "--amp", "bf16")
    assert waited == []
    assert harness.logged_steps(tmp_path / "run") == 5


# ---- Processes -----------------------------------------------------------------------------------


@pytest.fixture
def two(device) -> torch.device:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return device


def by_torchrun(
    count: int, program: Path, device: torch.device, *words: object
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", count]
    command += ["--master-port", free_port(), program, "--device", device.type, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment,
        check=False,
    )  # fmt: skip


def test_a_group_of_one_process_trains_as_none(data, device, tmp_path, monkeypatch) -> None:
    """NCCL with one process: what torchrun starts on one GPU."""
    train(device, data, tmp_path / "alone", "--epochs", 1, "--deterministic")
    launched = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free_port()}  # fmt: skip
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    train(device, data, tmp_path / "grouped", "--epochs", 1, "--deterministic")
    alone, grouped = (final_state(tmp_path / name)["checkpoint"] for name in ("alone", "grouped"))
    for name, tensor in alone["state_dict"].items():
        torch.testing.assert_close(grouped["state_dict"][name], tensor, msg=name)


FAILING = f"""
import os, runpy
from moco.train import loop
whole = loop.train_step
def failing(task, model, state, guard, batch):
    if os.environ["RANK"] == "1" and state.step == 2:
        raise RuntimeError("rank 1 fails here")
    return whole(task, model, state, guard, batch)
loop.train_step = failing
runpy.run_path({str(ROOT / "main_moco.py")!r}, run_name="__main__")
"""


def test_an_error_on_one_of_two_ranks_ends_the_job(data, two, tmp_path) -> None:
    """Long before the 30 minutes after which a rank gives up waiting."""
    program = tmp_path / "failing.py"
    program.write_text(FAILING, encoding="utf-8")
    ended = by_torchrun(2, program, two, *RUN, "--save-dir", tmp_path / "run", data)
    assert ended.returncode != 0
    assert "rank 1 fails here" in ended.stdout + ended.stderr


SLOWLY = [*RUN, "--epochs", "1", "--lr", "0.003"]  # rounding has no time to grow
IN_BATCH = "-a small_alexnetx0.125 --image-size 64 --batch-size 8 --drop-last -j 0 -p 1 --epochs 1"
SENTENCES = "--val-sentences 8 --vocab 20 --emb 6 --hidden 5 -b 8 --epochs 1 --seed 1 -p 1"


@pytest.mark.parametrize(
    ("program", "flags", "alike"),
    [
        ("main_moco.py", SLOWLY, True),
        ("main_moco.py", [*SLOWLY, "--group-size", "8"], True),  # over both
        ("main_moco.py", [*SLOWLY, "--amp", "bf16", "--compile"], False),
        ("scripts/train_in_batch.py", IN_BATCH.split(), False),  # batch norm of each share
        ("scripts/train_sentences.py", SENTENCES.split(), True),
    ],
    ids=["groups", "one group", "bf16 compiled", "in batch", "sentences"],
)
def test_two_gpus_train_every_task(program, flags, alike, data, two, tmp_path) -> None:
    """By gradients as one has them, where losses are of the whole batch (logged are rank 0's)."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(32)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    source = tmp_path / "text.txt" if "sentences" in program else data
    norms = []
    for count in (1, 2):
        run = tmp_path / str(count)
        ended = by_torchrun(count, ROOT / program, two, *flags, "--save-dir", run, source)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        lines = [line for line in harness.log_lines(run) if line["kind"] == "train"]
        norms.append([line["grad_norm"] for line in lines])
    assert len(norms[0]) == len(norms[1]) == 3
    if alike:
        np.testing.assert_allclose(norms[0], norms[1], rtol=2e-2)
