"""The training step: its optimizer, its parts, what it waits for, and what stops it between the
moments at which the host looks."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import final_state, finish, poison, start
from helpers import TINY, TinyNet, pretrain, read_log, two_views
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import checkpoint, cli
from moco.builder import MoCo
from moco.checkpoint import load_encoder
from moco.config import Encoder, Objective, PretrainConfig, PretrainData, PretrainOptim
from moco.log import Means
from moco.looks import Looks
from moco.precision import kernels
from moco.tasks.moco import MoCoTask
from moco.train import loop
from moco.train.guards import StepGuard
from moco.train.optimizer import fill_moments, fused_sgd
from moco.train.saver import BackgroundWriter
from moco.train.state import TrainState
from moco.train.step import train_step


def train(data: Path, run: Path, *flags: object) -> dict:
    """The state dict that a run ends with."""
    pretrain(data, run, "--check-every", 1, *flags)
    return torch.load(checkpoint.run_checkpoints(run)[-1], weights_only=True)["state_dict"]


def assert_close(a: dict, b: dict, tolerance: float) -> None:
    torch.testing.assert_close(dict(a), dict(b), rtol=tolerance, atol=tolerance)


# ---- Optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_the_optimizer_is_plain_sgd_and_takes_over_its_state(layout, momentum) -> None:
    """Three steps from the beginning, then three more from the state of plain SGD, which knows
    nothing of fused kernels or of memory formats."""

    def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in net.parameters():
                grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.empty_like(parameter).copy_(grad)
            optimizer.step()

    torch.manual_seed(0)
    plain, ours = TinyNet(5), TinyNet(5)
    ours.load_state_dict(plain.state_dict())
    ours.to(memory_format=layout)
    sgd = torch.optim.SGD(plain.parameters(), 0.1, momentum=momentum, weight_decay=1e-2)
    optim = PretrainOptim(lr=0.1, momentum=momentum, weight_decay=1e-2)
    fused = fused_sgd(ours, optim)
    for seeds in (range(3), range(3, 6)):
        steps(plain, sgd, seeds)
        steps(ours, fused, seeds)
        assert_close(plain.state_dict(), ours.state_dict(), 1e-6)
        fused = fused_sgd(ours, optim)
        fused.load_state_dict(sgd.state_dict())
        for group in fused.param_groups:
            group["fused"] = True  # as TrainState.restore does
        fill_moments(fused)


# ---- --accumulate --------------------------------------------------------------------------------


def tiny_run(folder: Path, **options: object) -> SimpleNamespace:
    """A guarded run of a net without batch norm, whose outputs do not depend on the shuffle."""
    torch.manual_seed(3)
    moco = MoCo(
        lambda num_classes: TinyNet(num_classes, batch_norm=False), 8, 64,
        align_alpha=2, unif_t=3,
    )  # fmt: skip
    symmetric, accumulate = options.get("symmetric", False), options.get("accumulate", 1)
    config = PretrainConfig(
        data=PretrainData(data="unused"),
        objective=Objective(align_w=3, unif_w=1, symmetric=symmetric),
        optim=PretrainOptim(batch_size=12, lr=0.1, weight_decay=0.0, accumulate=accumulate),
        encoder=Encoder(moco_k=64),
    )
    task, scaler = MoCoTask(config), torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(task, moco, fused_sgd(moco, config.optim), scaler, Means())
    guard = StepGuard(state, BackgroundWriter(folder, keep_last=1, keep_every=0), 0)
    return SimpleNamespace(moco=moco, task=task, state=state, guard=guard)


@pytest.mark.parametrize("symmetric", [False, True])
def test_parts_of_a_step_are_averaged_as_ranks_are(symmetric, tmp_path) -> None:
    """Gradients and losses are the means over the parts, each against the queue from before the
    step; key encoder and queue advance once."""
    im_q, im_k = two_views(0, 12)
    tiny = tiny_run(tmp_path, symmetric=symmetric, accumulate=3)
    before = {name: t.clone() for name, t in tiny.moco.state_dict().items()}
    losses = train_step(tiny.task, tiny.moco, tiny.state, tiny.guard, (im_q, im_k))
    loss = tiny.task.total(losses)
    grads = [p.grad for p in tiny.moco.encoder_q.parameters()]

    sums, values = [0.0] * len(grads), []
    for part in range(3):
        alone = tiny_run(tmp_path).moco
        here = slice(4 * part, 4 * part + 4)
        each = alone(im_q[here], im_k[here], symmetric=symmetric)
        each.combine(0, 3, 1).backward()
        values.append(each.combine(0, 3, 1).item())
        sums = [s + p.grad for s, p in zip(sums, alone.encoder_q.parameters(), strict=True)]
    for grad, total in zip(grads, sums, strict=True):
        torch.testing.assert_close(grad, total / 3, rtol=1e-5, atol=1e-7)
    assert loss.item() == pytest.approx(sum(values) / 3, rel=1e-6)
    assert loss.item() == pytest.approx(3 * losses.loss_align.item() + losses.loss_unif.item())

    keys = 24 if symmetric else 12
    after = tiny.moco.state_dict()
    assert after["queue_ptr"].item() == keys
    assert torch.equal(after["queue"][:, keys:], before["queue"][:, keys:])
    assert not (after["queue"][:, :keys] == before["queue"][:, :keys]).all(dim=0).any()


def test_accumulated_runs_train_and_enqueue_once_per_step(data, tmp_path, capsys) -> None:
    state = train(data, tmp_path / "r", "--accumulate", 2, "--max-steps", 3)
    said = capsys.readouterr().out
    assert "8 over 1 process(es), 8 each, in 2 parts of 4; optimizer, key encoder" in said
    assert "groups: 2 of 4 images, 1 in each part" in said and "WARNING" not in said
    assert state["module.queue_ptr"].item() == 24
    lines = read_log(tmp_path / "r")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx(3 * line["align"] + line["unif"], abs=1e-5)


@pytest.mark.long
def test_accumulation_over_two_processes_keeps_ranks_equal(images, tmp_path) -> None:
    """Gradients are averaged with the last part only; --check-every proves equal weights."""
    more = ["--bn-splits", 1, "--check-every", 1, "--epochs", 1, "--accumulate", 2, "--symmetric"]
    said = finish(tmp_path / "run", images, *more, processes=2)
    assert "16 over 2 process(es), 8 each, in 2 parts of 4" in said
    final = final_state(tmp_path / "run")["checkpoint"]
    assert final["state_dict"]["module.queue_ptr"].item() == 6 * 32 % 64


# ---- What a step waits for -----------------------------------------------------------------------

READS = {*"item tolist cpu numpy nonzero".split(), "__bool__", "__float__", "__int__", "__index__"}
READING_OPS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "masked_select")


class Watch(TorchFunctionMode):
    """Notes who reads a number of a tensor, or makes a tensor whose size depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.found = "start", []

    def note(self, what: str) -> None:
        # Order and augmentation of samples are the host's own business, on the CPU. The warning of
        # features that are not unit length reads on a CPU only; see UnitLengthWarning._look_later.
        hosts_own = ("dataloader.py", "moco/data/loader.py", "align_uniform/_checks.py")
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.endswith(hosts_own):
                return
            frame = frame.f_back
        self.found.append((self.where, what))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))


class WatchOps(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).split(".")[1] in READING_OPS:
            self.watch.note(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", ["--moco-t 0.2 --accumulate 2", "--symmetric --amp bf16"])
def test_no_step_between_checks_reads_a_number(flags, data, tmp_path, monkeypatch) -> None:
    """On a GPU each read would wait for all work before it. Here the CPU runs the steps that a GPU
    would: a check, with its line of output, every third one; and the run's start, its first."""
    watch = Watch()

    def watched(task, model, state, guard, batch):
        watch.where = "step"
        losses = train_step(task, model, state, guard, batch)
        watch.where = "check" if (state.step + 1) % 3 == 0 or state.step == 0 else "between"
        return losses

    monkeypatch.setattr(loop, "train_step", watched)
    monkeypatch.setattr(Looks, "steps_ahead", lambda self, step: 3)
    with watch, WatchOps(watch):
        # One epoch of nine steps, at the end of which it would be saved.
        train(data, tmp_path / "r", "--batch-size", 4, "--max-steps", 6, "-p", 3,
              "--check-every", 0, *flags.split())  # fmt: skip
    reads = [where for where, _ in watch.found]
    assert reads.count("check") > 0, "the watch sees nothing"
    assert [found for found in watch.found if found[0] in ("step", "between")] == []
    assert [line["step"] for line in read_log(tmp_path / "r")] == [3, 6]


# ---- What stops it between checks ----------------------------------------------------------------

# As on a GPU: the host looks every fifth step, and at the end of an epoch (of six steps).
LATE = """
from moco.looks import Looks
Looks.steps_ahead = lambda self, step: 5
"""
# Prints a digest of the query encoder's weights after each optimizer step.
DIGESTS = """
from moco.train import step
apply = step.apply_gradients
def applied(state, guard, longest):
    norm = apply(state, guard)
    total = sum(p.double().abs().sum().item() for p in state.module.encoder_q.parameters())
    print(f"weights {state.step} {total!r}", flush=True)
    return norm
step.apply_gradients = applied
"""


@pytest.mark.long
def test_a_bad_step_between_checks_changes_nothing_and_is_named(images, tmp_path) -> None:
    """The seventh step (number 6) is bad on one rank; the host looks after the tenth. Weights stay
    as they were after the sixth on all ranks, nothing bad is logged or saved. That the run goes on
    is in test_guards.py."""
    run = tmp_path / "run"
    flags = ["-p", 5, "--save-steps", 5]
    stopped = start(run, images, *flags, processes=2, before=LATE + poison(6) + DIGESTS)
    assert stopped.wait() == [1, 1], stopped.output()
    for rank in range(2):
        said = stopped.output(rank)
        assert "not finite in epoch 1, step 6: unif nan on rank 1" in said
        assert "checkpoint_0000.pth.tar" in said and "Traceback" not in said
        words = [line.split()[1:] for line in said.splitlines() if line.startswith("weights")]
        assert [int(step) for step, _ in words] == list(range(10))
        digests = [digest for _, digest in words]
        assert len(set(digests[:6])) == 6 and set(digests[5:]) == {digests[5]}
    assert [line["step"] for line in read_log(run)] == [5]


# ---- Memory format, kernels, compilation ---------------------------------------------------------


def test_both_memory_formats_learn_the_same_and_go_on_from_each_other(
    data, tmp_path, capsys
) -> None:
    """Files do not show the format; a run that changes it says that it is not bit for bit."""
    ends = {}
    for first, then in (("", ""), ("no-", "")):
        run = tmp_path / f"from-{first}to-{then}"
        train(data, run, f"--{first}channels-last", "--epochs", 2, "--max-steps", 2)
        saved = torch.load(checkpoint.run_checkpoints(run)[-1], weights_only=True)
        assert all(t.is_contiguous() for t in saved["state_dict"].values())
        capsys.readouterr()
        ends[first, then] = train(
            data, run, f"--{then}channels-last", "--epochs", 2, "--max-steps", 4,
            "--resume", "auto",
        )  # fmt: skip
        said = capsys.readouterr().out
        assert ("not bit for bit" in said) == (first != then)
        assert "channels_last, no compile" in said
        if first != then:
            assert f"channels_last: {not first} before, {not then} now" in said
    # Later, rounding has grown: a ReLU is on in one and off in another.
    assert_close(ends["no-", ""], ends["", ""], 1e-3)


@pytest.mark.parametrize(
    ("flags", "on"),
    [("", True), ("--bn-splits 2", True), ("--no-channels-last", False)],
)
def test_channels_last_where_it_was_measured_to_help(flags, on, data) -> None:
    config = cli.pretrain_config([*TINY, *flags.split(), str(data)])
    assert config.speed.channels_last is on


def test_deterministic_is_an_option_and_ends_with_the_run(data, tmp_path, monkeypatch) -> None:
    """As does the full precision of matrix products, whatever was chosen before."""
    torch.set_float32_matmul_precision("high")
    seen = []

    def watched(*args):
        seen.append((
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(),
        ))  # fmt: skip
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", watched)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    train(data, tmp_path / "a", "--max-steps", 1)
    assert seen == [(False, False, True, "highest")] and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    train(data, tmp_path / "b", "--max-steps", 1, "--deterministic")
    assert seen[1:] == [(True, True, False, "highest")]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in (":4096:8", ":16:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")


def test_what_a_caller_of_the_library_has_chosen_is_there_again() -> None:
    """Also TF32 of one backend, after which torch 2.9 refuses to read the setting of all."""
    products = torch.backends.cuda.matmul
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if hasattr(products, "fp32_precision"):
            products.fp32_precision = "tf32"
        with kernels(deterministic=False):
            assert getattr(products, "fp32_precision", "ieee") == "ieee"
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert getattr(products, "fp32_precision", "tf32") == "tf32"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def test_compile_without_a_compiler_is_refused(data, monkeypatch, capsys) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as stop:
        cli.pretrain_config([*TINY, "--compile", str(data)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--compile needs a C++ compiler" in line and "no-such-compiler" in line


AOT = """
import functools, torch
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
"""


@pytest.mark.long
def test_compiled_encoders_train_the_same_under_the_same_names(images, tmp_path) -> None:
    """With groups of batch norm and parts; the file reads as any other. Traced and differentiated
    as by --compile, but without half a minute of g++; tests/data/test_loader.py has that."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    flags = ["--channels-last", "--accumulate", 2, "--max-steps", 2]
    said = finish(tmp_path / "compiled", images, *flags, "--compile", before=AOT)
    assert "channels_last, compile," in said
    finish(tmp_path / "plain", images, *flags)
    a, b = (
        torch.load(tmp_path / name / "step_00000002.pth.tar", weights_only=True)["state_dict"]
        for name in ("compiled", "plain")
    )
    assert list(a) == list(b)
    assert_close(a, b, 1e-3)
    encoder, info = load_encoder(tmp_path / "compiled" / "step_00000002.pth.tar")
    assert info["arch"] == "resnet8" and info["layout"] == "moco"
