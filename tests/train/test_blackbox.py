"""The black box: what a run leaves when a step goes wrong, and the step rerun from it."""

from __future__ import annotations

import json
import math
import random
import shlex
from pathlib import Path

import pytest
import torch
from helpers import refusal
from PIL import Image

import main_moco
from moco import checkpoint
from moco.errors import CheckpointError
from moco.train.blackbox import SpikeAlarm
from moco.train.guards import CollapseAlarm
from scripts import train_in_batch, train_sentences

FLAGS = shlex.split(
    "-a resnet8 --image-size 32 --batch-size 8 --moco-k 64 --moco-dim 16 --mlp --epochs 2 "
    "-j 0 --device cpu --seed 1 -p 1 --knn-every 0"
)


@pytest.fixture
def run(elsewhere) -> Path:
    return elsewhere / "run"


def replayed(run: Path, capsys, command=main_moco) -> tuple[dict, str]:
    capsys.readouterr()
    command.main(["--replay", str(run / "failed"), "--device", "cpu"])
    said = capsys.readouterr().out
    return json.loads((run / "failed" / "replay.json").read_text()), said


def test_a_step_that_is_not_finite_is_rerun_and_its_first_tensor_named(data, run, capsys) -> None:
    """A learning rate that sends the weights away: the step after the first overflows."""
    status, line = refusal(
        main_moco.main, [*FLAGS, "--lr", "1e30", "--save-dir", run, data], capsys
    )
    assert status == 1 and f"--replay {run / 'failed'} reruns that step" in line
    assert "not finite in epoch 0, step 1: " in line and "last checkpoint is none yet" in line
    assert not list(run.glob("*.pth.tar"))
    about = json.loads((run / "failed" / "failed.json").read_text())
    assert about["kind"] == "not finite" and about["text"] in line
    assert about["kept_at_step"] == about["step"], "a CPU looks after every step"
    content = checkpoint.read_checkpoint(run / "failed" / "before.pth.tar")
    assert content["optimizer"]["state"] == {}, "what no rerun needs is left out"

    before = sorted(path.name for path in run.iterdir())
    found, said = replayed(run, capsys)
    assert before == sorted(path.name for path in run.iterdir()), "the run itself is left alone"
    (part,) = found["parts"]
    assert part["total"] in ("nan", "inf", "-inf") or not part["first_not_finite"].startswith("out")
    assert part["first_not_finite"].startswith(("output of encoder_", "gradient of"))
    assert f"first not finite: {part['first_not_finite']}" in said
    layer = part["layers"]["encoder_q.conv1"]
    assert layer["gradient"].keys() == {"align", "unif", "total"} and float(layer["weight"]) > 1e20
    pictures = sorted((run / "failed").glob("views_*.png"))
    assert len(pictures) == 1 and Image.open(pictures[0]).size == (266, 70)  # 8 pairs, 4 in a row


@pytest.mark.parametrize("looks_every", [1, 3])
def test_the_step_is_the_same_bit_for_bit(looks_every, data, run, capsys, monkeypatch) -> None:
    """Losses of the rerun are those of the log; also where ranks looked some steps before it."""
    ring = iter([False, False, False, False, True])
    monkeypatch.setattr(SpikeAlarm, "rings", lambda self, loss: next(ring, False))
    if looks_every > 1:  # as on a GPU
        monkeypatch.setattr("moco.looks.Looks.together", every(looks_every))
    main_moco.main([*FLAGS, "-p", "3", "--save-dir", str(run), str(data)])
    assert "warning: the loss has jumped in epoch 1, step 4" in capsys.readouterr().out
    about = json.loads((run / "failed" / "failed.json").read_text())
    assert (about["kind"], about["step"]) == ("spike", 4)
    assert about["kept_at_step"] == (4 if looks_every == 1 else 3)
    found, said = replayed(run, capsys)
    (part,) = found["parts"]
    assert "all of it is finite" in said and part["first_not_finite"] is None
    assert about["text"].endswith(f"{part['total']:g} on rank 0")
    # The log has means over steps 3 to 5; that of step 4 comes from a run that prints each step.
    each = run.with_name("each")
    main_moco.main([*FLAGS, "--save-dir", str(each), str(data)])
    lines = [json.loads(line) for line in (each / "log.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if (line["kind"], line["step"]) == ("train", 5))
    assert part["total"] == logged["loss"]
    assert part["terms"] == {name: logged[name] for name in ("align", "unif")}
    squares = sum(
        row["gradient"]["total"] ** 2 for row in part["layers"].values() if "gradient" in row
    )
    assert math.isclose(math.sqrt(squares), logged["grad_norm"], rel_tol=1e-5)
    state = torch.load(each / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"]
    boxed = torch.load(run / "checkpoint_0001.pth.tar", weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], boxed[name]) for name in state), (
        "training goes on as before"
    )


def every(steps: int):
    def together(self, step: int, *flags: bool, device: torch.device) -> list[bool]:
        self.next = step + steps
        return list(flags)

    return together


def test_a_step_within_the_batch_is_rerun_from_numbers_that_are_not_finite(data, run, capsys):
    """Running variances that overflow in the step before show in no loss of training."""
    flags = "-a resnet8 --image-size 16 -b 5 -j 0 --device cpu --seed 0 --knn-every 0 --lr 1e9"
    argv = [*flags.split(), "--save-dir", run, data]
    status, line = refusal(train_in_batch.main, argv, capsys)
    assert status == 1 and f"--replay {run / 'failed'} reruns that step" in line
    file = run / "failed" / "before.pth.tar"
    content = checkpoint.read_checkpoint(file, failed=True)
    content["state_dict"]["module.encoder_q.bn1.running_var"].fill_(math.inf)
    checkpoint.write_checkpoint(file, content)
    with pytest.raises(CheckpointError, match="running_var"):
        checkpoint.read_checkpoint(file)
    found, said = replayed(run, capsys, train_in_batch)
    (part,) = found["parts"]
    assert part["first_not_finite"] == "buffer encoder_q.bn1.running_var"
    assert "written: " in said and "1 picture(s) of 5 images" in said
    status, line = refusal(main_moco.main, ["--replay", run / "failed"], capsys)
    assert status == 2 and "is of scripts/train_in_batch.py, which reruns its step" in line


def test_a_step_of_sentences_with_a_collapse_is_rerun(run, monkeypatch, capsys) -> None:
    """Of features that the alarm calls one point: it wants them to spread beyond reason."""
    text = run.with_name("text.txt")
    text.write_text("".join(f"number {i} sat on mat {i % 7}\n" for i in range(60)))
    monkeypatch.setattr(CollapseAlarm, "LEAST_STD", 20.0)
    flags = "--emb 4 --hidden 4 --vocab 20 --val-sentences 10 -b 10 -p 1 --collapse-steps 2"
    argv = [*flags.split(), "--device", "cpu", "--max-steps", 3, "--save-dir", run, text]
    train_sentences.main([*map(str, argv)])
    found, said = replayed(run, capsys, train_sentences)
    (part,) = found["parts"]
    assert (found["kind"], found["epoch"], found["step"]) == ("collapse", 0, 2)
    assert part["layers"]["f.gru"]["output"] > 0 and 0 < part["feature_std"] < 20
    assert "all of it is finite" in said and "picture" not in said


def test_what_is_no_black_box_is_refused(run, capsys) -> None:
    run.mkdir()
    status, line = refusal(main_moco.main, ["--replay", run], capsys)
    assert status == 2 and "expected RUN/failed" in line
    checkpoint.write_checkpoint(run / "before.pth.tar", {"epoch": 1, "state_dict": {}})
    status, line = refusal(main_moco.main, ["--replay", run], capsys)
    assert status == 2 and "expected RUN/failed" in line and "it has no 'failed'" in line


def test_a_spike_is_a_loss_far_above_those_before() -> None:
    """A noisy loss that falls, or rises slowly, is none; one jump is, once."""
    draw = random.Random(0)
    alarm = SpikeAlarm()
    for slope in (-0.01, 0.01):
        assert not any(alarm.rings(slope * i + draw.gauss(0, 0.1)) for i in range(500))
    assert alarm.rings(25.0) and not alarm.rings(25.0)
    early, constant = SpikeAlarm(), SpikeAlarm()
    assert not any(early.rings(100.0 * (i == 50)) for i in range(90)), "too few to tell"
    assert not any(constant.rings(3.0 + 1e-3 * (i == 150)) for i in range(200))
