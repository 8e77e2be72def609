"""What stops a run and what it warns of: numbers not finite, ranks that drift, collapse."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import Processes, differences, final_state, finish, poison, start
from helpers import read_log

from moco import checkpoint
from moco.builder import MoCoLosses, _Batch
from moco.config import PretrainOptim
from moco.errors import CheckpointError, TrainingError
from moco.log import Means, RunLog
from moco.train import guards
from moco.train.optimizer import fused_sgd
from moco.train.saver import BackgroundWriter
from moco.train.state import TrainState
from moco.train.step import apply_gradients


@pytest.mark.long
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_optimizer(
    images, whole, tmp_path
) -> None:
    """Rank 1's, in the eighth step. All name the term, the rank and the step; what is on disk is
    good: the run goes on from it and ends bit for bit as one that had no such loss."""
    run = tmp_path / "run"
    stopped = start(run, images, "--save-steps", 7, processes=2, before=poison(7))
    assert stopped.wait() == [1, 1]
    for rank in range(2):
        said = stopped.output(rank)
        assert "not finite in epoch 1, step 7: unif nan on rank 1" in said
        assert "align" not in said.split("not finite")[1], "the other term was finite"
        assert re.search(r"The last checkpoint is \S*step_00000007.pth.tar", said)
        assert "Traceback" not in said
    path, content = checkpoint.newest_valid(run, print)
    assert (path.name, content["step"]) == ("step_00000007.pth.tar", 7)
    boxed = checkpoint.read_checkpoint(run / "failed" / "before.pth.tar")
    assert boxed["failed"]["step"] == 7 and len(boxed["rng"]) == 2
    rerun = Processes(tmp_path / "rerun", "--replay", run / "failed", count=2)
    assert rerun.wait() == [0, 0], rerun.output()
    assert re.findall(r"^rank [01]$", rerun.output(0), re.M) == ["rank 0", "rank 1"]
    finish(run, images, processes=2)
    assert differences(final_state(whole[2]), final_state(run)) == []


# ---- fp16 overflows ------------------------------------------------------------------------------


def overflowing_run(folder: Path, scale: float, max_overflows: int) -> SimpleNamespace:
    """One weight under a real scaler and the optimizer of every run, guarded."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(2))
    optimizer = fused_sgd(module, PretrainOptim(lr=0.1, weight_decay=0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    state = TrainState(None, module, optimizer, scaler, Means(), step=3)
    writer = BackgroundWriter(folder, keep_last=1, keep_every=0)
    guard = guards.StepGuard(state, writer, max_overflows)
    return SimpleNamespace(run=state, weight=module.weight, guard=guard)


def one_step(guarded: SimpleNamespace, factor: float, *, check: bool = True) -> None:
    """What a step does, with a gradient of `factor`."""
    run, guard = guarded.run, guarded.guard
    run.optimizer.zero_grad()
    losses = MoCoLosses(loss_align=(guarded.weight * factor).sum())
    run.scaler.scale(guard.poison(losses.loss_align)).backward()
    guard.note(apply_gradients(run, guard), losses.loss_align, losses)
    run.step += 1
    if check:
        guard.check(False, False)


@pytest.mark.parametrize("every", [1, 3])
def test_an_overflow_of_the_scaler_leaves_the_step_out_and_is_counted(every, tmp_path) -> None:
    guarded = overflowing_run(tmp_path, scale=2.0**127, max_overflows=5)
    run = guarded.run
    for step in range(1, 4):  # 1e3 * 2**127 is not finite; the scaler halves each time
        one_step(guarded, 1e3, check=step % every == 0)
        assert guarded.weight.tolist() == [1.0, 1.0], "the optimizer has not stepped"
        assert run.scaler.get_scale() == 2.0 ** (127 - step)
        assert run.skipped == run.skipped_in_a_row == step // every * every
    assert "grad_norm" not in run.means.sums and run.means.counts["align"] == 3
    one_step(guarded, 1e-3)
    assert (run.skipped, run.skipped_in_a_row) == (3, 0)
    # As if the first step of plain SGD: momentum has not been touched by those left out.
    assert torch.equal(guarded.weight.detach(), torch.ones(2) - 0.1 * torch.tensor(1e-3))
    assert run.means.counts["grad_norm"] == 1


def test_too_many_overflows_in_a_row_stop(tmp_path) -> None:
    checkpoint.write_checkpoint(checkpoint.step_path(tmp_path, 2), {"step": 2})
    guarded = overflowing_run(tmp_path, scale=2.0**127, max_overflows=3)
    with pytest.raises(TrainingError) as error:
        for _ in range(9):
            one_step(guarded, 1e3)
    assert guarded.run.skipped == 4 and guarded.weight.tolist() == [1.0, 1.0]
    for part in ("epoch 0, step 6", "gradient norm inf", "4 steps in a row", "step_00000002"):
        assert part in str(error.value)


@pytest.mark.parametrize("scaled", [True, False])
def test_no_step_after_one_that_is_not_finite_changes_the_weights(scaled, tmp_path) -> None:
    """Also when later steps are fine and the host looks much later, and names the first one."""
    guarded = overflowing_run(tmp_path, scale=2.0, max_overflows=5)
    run = guarded.run
    if not scaled:
        run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    one_step(guarded, 1.0, check=False)
    weight = guarded.weight.detach().clone()
    momentum = run.optimizer.state[guarded.weight]["momentum_buffer"].clone()
    assert weight[0] < 1
    for factor in (math.inf, 1.0, 1.0, math.nan, 1.0):
        one_step(guarded, factor, check=False)
        assert torch.equal(guarded.weight.detach(), weight)
        assert torch.equal(run.optimizer.state[guarded.weight]["momentum_buffer"], momentum)
    with pytest.raises(TrainingError, match="epoch 0, step 4: align inf on rank 0"):
        guarded.guard.check(False, False)
    assert run.skipped == 0, "no overflow"


def test_no_step_after_a_gradient_that_is_not_finite_changes_the_weights(tmp_path) -> None:
    """Though all losses are."""
    guarded = overflowing_run(tmp_path, scale=1.0, max_overflows=5)
    guarded.run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    hook = guarded.weight.register_hook(lambda gradient: gradient * math.inf)
    one_step(guarded, 1.0, check=False)
    hook.remove()
    one_step(guarded, 1.0, check=False)
    assert guarded.weight.tolist() == [1.0, 1.0]
    with pytest.raises(TrainingError, match="epoch 0, step 3: gradient norm inf, all loss terms"):
        guarded.guard.check(False, False)


def test_a_file_that_could_not_be_written_ends_the_run_at_the_next_look(tmp_path) -> None:
    """Not at the next save only, which may be hours away."""
    guarded = overflowing_run(tmp_path, scale=1.0, max_overflows=5)
    one_step(guarded, 1.0)
    writer = guarded.guard.writer
    writer.write(tmp_path / "gone" / "step_00000004.pth.tar", {"step": 4})
    writer.wait()
    with pytest.raises(CheckpointError, match="could not save in .*last good checkpoint is none"):
        one_step(guarded, 1.0)


# ---- Ranks that differ ---------------------------------------------------------------------------

DRIFT = """
import torch
from moco import distributed
from moco.builder import MoCo
from moco.config import Launch
from moco.errors import TrainingError
from moco.launch import launch
from moco.train import guards
def work(device, args):
    torch.manual_seed(0)
    moco = MoCo(lambda num_classes: torch.nn.Linear(4, num_classes), 8, 16, align_alpha=2)
    tensors = [*moco.parameters(), moco.queue.t(), moco.queue_ptr]
    guards.stop_if_ranks_differ(tensors, 1)
    print("equal", flush=True)
    for rank, name in ((1, "queue"), (2, "encoder_k.weight"), (2, "queue_ptr")):
        tensor = moco.state_dict()[name]
        before = tensor.clone()
        if distributed.rank() == rank:
            where = (0,) * tensor.dim()
            tensor[where] = tensor[where] + 1 if name == "queue_ptr" else -tensor[where]
        try:
            guards.stop_if_ranks_differ(tensors, 5)
        except TrainingError as error:
            print(name, error, flush=True)
        tensor.copy_(before)
    swapped = moco.queue.t()[[1, 0]] if distributed.rank() == 1 else moco.queue.t()[[0, 1]]
    moco.queue.t()[:2] = swapped
    try:
        guards.stop_if_ranks_differ(tensors, 6)
    except TrainingError as error:
        print("swapped", error, flush=True)
launch(work, None, Launch(device="cpu"))
"""


@pytest.mark.long
def test_a_rank_with_other_weights_or_another_queue_is_named(tmp_path) -> None:
    """One element, one sign, the pointer, or two keys that have changed places."""
    ranks = Processes(tmp_path / "out", count=3, code=DRIFT)
    assert ranks.wait() == [0, 0, 0], ranks.output()
    for rank in range(3):
        said = ranks.output(rank)
        assert "all_gather_into_tensor" not in said, "torch warns of its old name"
        lines = re.findall(r"^(equal$|\S+ .*queue of rank .*)", said, re.M)
        assert lines[0] == "equal"
        named = [(line.split()[0], line.split("queue of rank ")[1][0]) for line in lines[1:]]
        expected = [("queue", "1"), ("encoder_k.weight", "2"), ("queue_ptr", "2"), ("swapped", "1")]
        assert named == expected
        assert "after step 5" in lines[1] and "--resume auto" in lines[1]


# ---- Collapse ------------------------------------------------------------------------------------


def losses_of(q: torch.Tensor) -> MoCoLosses:
    return MoCoLosses(_batches=[_Batch(None, 0, q, q)])


def test_the_collapse_alarm_warns_after_as_many_steps(tmp_path, capsys) -> None:
    """In the log (which TensorBoard gets as well) and on the screen, and again as many steps later;
    features that spread for one moment start the count anew."""
    torch.manual_seed(0)
    spread = losses_of(torch.nn.functional.normalize(torch.randn(64, 16), dim=1))
    collapsed = losses_of(torch.ones(64, 16) / 4 + 1e-4 * torch.randn(64, 16))
    assert spread.feature_std() > 0.9 and collapsed.feature_std() < 0.01
    log, alarm = RunLog(tmp_path), guards.CollapseAlarm(steps=50, remedy="Raise --moco-unif-w")
    for step in range(10, 301, 10):
        features = spread if step in (10, 50) else collapsed
        alarm.check(features.feature_std().item(), step, log)
    log.close()
    lines = read_log(tmp_path, "warning")
    warned = [(line["step"], line["collapsed_since"]) for line in lines]
    assert warned == [(110, 60), (160, 110), (210, 160), (260, 210)]
    said = capsys.readouterr().out
    assert said.count("warning: features have collapsed") == 4 and "--moco-unif-w" in said
    quiet = guards.CollapseAlarm(steps=0, remedy="")
    quiet.check(0.0, 1, RunLog(tmp_path))
    quiet.check(0.0, 1000, RunLog(tmp_path))
    assert "warning" not in capsys.readouterr().out
