"""Run folders and a release that commit 0c3bcca wrote (fixtures/write.py) are read, resumed and
verified by the code of today."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from fixtures.write import LINCLS, PRETRAIN, write_images
from helpers import ROOT, load_script, read_log, refusal

import main_lincls
import main_moco
from moco.checkpoint import load_encoder

FIXTURES = ROOT / "tests" / "fixtures"
# Bits are of one machine: sums of float32 run in another order on another CPU.
CLOSE = {"rel": 1e-3, "abs": 1e-3}
ONE_IMAGE = 100 / 48 + 1e-6  # percent of the validation images


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as it was when the old commands had run in it, but for the later checkpoints."""
    for name in ("pretrain", "lincls", "release"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    write_images(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one(pattern: str) -> Path:
    (path,) = Path().glob(pattern)
    return path


def read_json(path: str) -> dict:
    return json.loads(Path(path).read_text())


def logged(kind: str, path: str) -> dict[int, dict]:
    """Step -> line of the log, in the order of the file."""
    return {line["step"]: line for line in read_log(Path(path), kind)}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


# ---- Pretraining ------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """As the fixtures were written: with more of them sums run in another order, and by the end of
    a run the gradient's norm is 0.1 % off, with the old code as with the new."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_run_stopped_in_mid_epoch_goes_on_to_the_end_that_it_had():
    assert [path.name for path in Path("pretrain").glob("*.pth.tar")] == ["step_00000003.pth.tar"]
    main_moco.main([*PRETRAIN[1:], "--resume", "auto", "--max-steps", "4"])
    main_moco.main([*PRETRAIN[1:], "--resume", "auto"])  # which the new code's file leads on

    old, new = logged("train", FIXTURES / "pretrain"), logged("train", "pretrain")
    assert list(new) == list(old) == [2, 4, 6, 8]
    assert new[2] == old[2]  # from before the checkpoint: the line itself
    for step in (4, 6, 8):
        for name in ("loss", "align", "unif", "grad_norm", "lr"):
            assert new[step][name] == pytest.approx(old[step][name], **CLOSE), (step, name)

    # The release was made of the old run's last checkpoint.
    expected = tensors(one("release/*-full-*.pth"))
    found = tensors(Path("pretrain/checkpoint_0001.pth.tar"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3, msg=name)


def test_a_run_that_goes_on_notes_its_arguments_under_the_old_names():
    main_moco.main([*PRETRAIN[1:], "--resume", "auto", "--max-steps", "4"])
    old, new = read_json(FIXTURES / "pretrain" / "args.json"), read_json("pretrain/args.json")
    content = torch.load("pretrain/checkpoint_0000.pth.tar", weights_only=True)
    assert old.keys() <= new.keys()
    other = {name for name in old if new[name] != old[name]}
    assert other - {"provenance"} == {"resume", "checkpoint", "max_steps"}
    saved = torch.load("pretrain/step_00000003.pth.tar", weights_only=True)
    assert saved.keys() <= content.keys() and saved["args"].keys() <= content["args"].keys()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--moco-unif-t 2", "unif"),
        ("--moco-align-w 2", "align"),
        ("--moco-unif-no-intra-batch", "intra"),
        ("--lr 0.02", "lr: 0.01 before, 0.02 now"),
        ("--wd 1e-3", "weight_decay: 0.0001 before, 0.001 now"),
    ],
)
def test_a_run_does_not_go_on_under_another_objective_or_rate(flags, named, capsys):
    argv = [*PRETRAIN[1:], "--resume", "auto", *flags.split()]
    status, said = refusal(main_moco.main, argv, capsys)
    assert status == 1 and named in said
    assert "was trained with other arguments" in said and "--allow-changes" in said


# ---- Encoders ---------------------------------------------------------------------------------


def test_encoders_load_from_every_kind_of_file():
    images = torch.rand(2, 3, 32, 32)
    encoder, info = load_encoder("pretrain/step_00000003.pth.tar")
    assert info["arch"] == "resnet8"
    assert encoder.eval()(images).shape == (2, 64)
    saved = tensors(Path("pretrain/step_00000003.pth.tar"))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, saved[f"module.encoder_q.{name}"]), name

    # These hold the encoder of the run's end.
    files = [*Path("release").glob("*.pth"), *Path("release").glob("*.safetensors")]
    assert len(files) == 4
    end, _ = load_encoder("lincls/checkpoint.pth.tar")
    for path in files:
        found, info = load_encoder(path)
        assert info["arch"] == "resnet8"
        assert torch.equal(found.eval()(images), end.eval()(images)), path


# ---- Linear evaluation ------------------------------------------------------------------------


def test_a_probe_has_the_accuracy_that_was_written_down():
    argv = "data --device cpu -j 0 -e --pretrained lincls/checkpoint.pth.tar --save-dir again"
    main_lincls.main(argv.split())
    expected = read_json("lincls/lincls.json")["last"]["top1"]
    assert expected > 60  # of three classes
    assert read_json("again/lincls.json")["top1"] == pytest.approx(expected, abs=ONE_IMAGE)


def probe_argv(*more: str) -> list[str]:
    """The old command, with the release in place of the checkpoint that it was made of."""
    argv = [*LINCLS[1:], "--resume", "auto", *more]
    argv[argv.index("--pretrained") + 1] = str(one("release/*-full-*.pth"))
    return argv


def test_a_probe_goes_on_for_more_epochs():
    before = read_json("lincls/lincls.json")
    old = logged("val", "lincls")
    main_lincls.main(probe_argv("--epochs", "7"))
    after = read_json("lincls/lincls.json")
    assert before["last"]["epoch"] == 5 and after["last"]["epoch"] == 6
    assert after["best"]["top1"] >= before["best"]["top1"]
    new = list(logged("val", "lincls").values())
    assert new[:6] == list(old.values()) and [line["epoch"] for line in new] == list(range(7))


def test_a_probe_does_not_go_on_under_another_rate(capsys):
    status, said = refusal(main_lincls.main, probe_argv("--lr", "0.1"), capsys)
    assert status == 1 and "lr: 0.03 before, 0.1 now" in said


# ---- Releases and reports ---------------------------------------------------------------------


def test_the_release_verifies(capsys):
    load_script("release").main(["--verify", "release"])
    assert re.search(r"release: verified \d+ files", capsys.readouterr().out)


def test_the_run_and_its_probe_are_compared(capsys):
    load_script("compare_runs").main(["pretrain", "lincls", "--out", "report.html"])
    table = capsys.readouterr().out
    top1 = read_json("lincls/lincls.json")["last"]["top1"]
    assert "3 * align(alpha=2) + 1 * uniform(t=3" in table and f"{top1:.2f}" in table
    assert f"{top1:.2f}" in Path("report.html").read_text()
