"""The example of docs/own_task.md trains, saves and resumes."""

from __future__ import annotations

import re
import runpy
import sys

from helpers import ROOT, read_log, write_images

from moco.checkpoint import load_encoder


def test_the_example_trains_saves_and_resumes(elsewhere, tmp_path, monkeypatch, capsys) -> None:
    page = (ROOT / "docs" / "own_task.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code.splitlines()) <= 60
    program, run = tmp_path / "own_task.py", tmp_path / "run"
    program.write_text(code, encoding="utf-8")
    write_images(tmp_path, {"images": 24}, size=20)

    def train(steps: int) -> str:
        command = [
            *(program, "-a", "resnet8", "--image-size", "16", "-j", "0"),
            *("--batch-size", "8", "--moco-dim", "8", "--epochs", "2", "--lr", "0.01"),
            *("--seed", "1", "-p", "1", "--max-steps", str(steps), "--device", "cpu"),
            *("--save-dir", run, "--resume", "auto", tmp_path / "images"),
        ]
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        runpy.run_path(str(program), run_name="__main__")
        return capsys.readouterr().out

    def logged() -> dict[int, dict]:
        return {line["step"]: line for line in read_log(run)}

    train(4)
    first = logged()
    assert list(first) == [1, 2, 3, 4]
    for line in first.values():
        total = 3 * line["loss_align"] + line["loss_unif"]  # the default weights
        assert abs(line["loss"] - total) < 1e-4
    assert list(run.glob("*.pth.tar"))

    assert "1 epochs and 1 steps done" in train(6)
    assert list(logged()) == [1, 2, 3, 4, 5, 6]
    assert {step: logged()[step] for step in first} == first  # steps 1 to 4 were not trained again
    _, info = load_encoder(str(run / "checkpoint_0001.pth.tar"))
    assert info["layout"] == "moco"
