"""Training within the batch: losses of a step, processes, the last batch, command line, resume."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import replace
from pathlib import Path

import harness
import pytest
import reference
import torch
import torch.nn.functional as F
from helpers import TinyNet, differences, load_script, read_log, refusal, two_views, write_images

import main_moco
from align_uniform.metrics import uniformity, uniformity_interval
from moco.checkpoint import load_encoder
from moco.cli import in_batch_config
from moco.config.resume import learning_changes
from moco.data.images import FolderImages
from moco.data.loader import EpochBatches
from moco.data.views import in_batch_recipe
from moco.evaluate.extraction import Loading, extract, load_image_encoder
from moco.memory import Memory
from moco.tasks.collapse import collapse_warning
from moco.tasks.in_batch import InBatchTask, TwoViews
from moco.train import feasible

train_in_batch = load_script("train_in_batch")
SMALL = shlex.split(
    "-a small_alexnetx0.05 --image-size 16 --batch-size 8 --dim 8 -j 0 --device cpu --seed 1 -p 1"
)


def task_of(data: Path, *flags: str) -> InBatchTask:
    return InBatchTask(in_batch_config([*SMALL, *flags, str(data)]))


# ---- Losses


def test_a_step_is_the_equations(data) -> None:
    """Value and gradient of all three terms, of features of both views in one forward pass."""
    flags = "--contr-w 0.7 --contr-tau 0.3 --align-w 1.5 --align-alpha 3 --unif-w 0.4 --unif-t 1.5"
    task = task_of(data, *flags.split())
    module = TwoViews(TinyNet(8), 8).double()
    module.forward = forward64(module)
    views = [v.double() for v in two_views(0, 6)]
    losses = task.losses(module, views, 0, 1)
    task.total(losses).backward()
    gradient = module.encoder_q.conv1.weight.grad.clone()
    module.zero_grad()
    x, y = F.normalize(module.encoder_q(torch.cat(views)), dim=1).chunk(2)
    uniform = (reference.uniform(x, 1.5) + reference.uniform(y, 1.5)) / 2
    terms = {
        "contr": reference.in_batch_info_nce(x, y, 0.3),
        "align": reference.align(x, y, 3),
        "unif": uniform,
    }
    (0.7 * terms["contr"] + 1.5 * terms["align"] + 0.4 * uniform).backward()
    torch.testing.assert_close(dict(losses.items()), terms)
    torch.testing.assert_close(gradient, module.encoder_q.conv1.weight.grad)


def test_images_may_be_prepared_by_a_module() -> None:
    module, (first, second, *_) = TwoViews(TinyNet(8), 8).eval(), two_views(0, 4)
    as_they_are = module(first, second)[0]
    module.prepare = torch.nn.Hardtanh(0, 0.1)
    expected = F.normalize(module.encoder_q(first.clamp(0, 0.1)), dim=1)
    torch.testing.assert_close(module(first, second)[0], expected)
    assert not torch.allclose(as_they_are, expected)


def forward64(module: TwoViews):
    """The module's own forward pass, without its rounding to float32."""

    def forward(first, second):
        return (*F.normalize(module.encoder_q(torch.cat([first, second])), dim=1).chunk(2), None)

    return forward


def test_terms_of_weight_0_are_shown_without_a_gradient(data) -> None:
    task = task_of(data)
    losses = task.losses(TwoViews(TinyNet(8), 8), two_views(0, 4), 0, 1)
    assert [name for name, term in losses.items() if term.requires_grad] == ["align", "unif"]
    assert task.total(losses).item() == pytest.approx(
        sum(term.item() for name, term in losses.items() if name != "contr")
    )


TWO = """
import sys, torch
sys.path[:0] = {paths!r}
from helpers import TinyNet, two_views
from moco import distributed
from moco.launch import launch_config
from moco.cli import in_batch_config
from moco.config.resume import learning_changes
from moco.tasks.in_batch import InBatchTask, TwoViews
from moco.train import feasible

def step(device, config):
    torch.manual_seed(0)
    module = TwoViews(TinyNet(8, batch_norm=False), 8)
    model = distributed.data_parallel(module)
    share = 8 // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    task = InBatchTask(config)
    losses = task.losses(model, [view[mine] for view in two_views(0, 8)], 0, 1)
    task.total(losses).backward()
    found = {{"loss": dict(losses.items()), "grad": module.encoder_q.conv1.weight.grad}}
    torch.save(found, sys.argv[1] + f"/{{distributed.world_size()}}.{{distributed.rank()}}")

launch_config(step, in_batch_config(sys.argv[2:]))
"""


@pytest.mark.long
def test_two_processes_have_the_objective_of_the_whole_batch(data, tmp_path) -> None:
    paths = [str(harness.ROOT), str(harness.ROOT / "tests")]
    flags = [*SMALL, "--contr-w", "1", "--contr-tau", "0.3", str(data)]
    for count in (1, 2):
        code = TWO.format(paths=paths)
        run = harness.Processes(tmp_path / f"{count}", tmp_path, *flags, count=count, code=code)
        assert set(run.wait()) == {0}, run.output()
    one, *two = (torch.load(tmp_path / name) for name in ("1.0", "2.0", "2.1"))
    for other in two:
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("step", "images", "lr"), [(4, 6, 0.2), (5, 8, 0.02)])
def test_a_step_of_a_run_is_sgd_on_the_equations(
    data, tmp_path, elsewhere, step, images, lr
) -> None:
    """The last, smaller batch of an epoch, and the first after the learning rate drops."""
    flags = ["--lr", "0.2", "--schedule", "1", "--epochs", "2", "--save-dir", str(tmp_path / "run")]
    saved = []
    for steps in (step - 1, step):
        train_in_batch.main(
            [*SMALL, *flags, "--max-steps", f"{steps}", "--resume", "auto", f"{data}"]
        )
        newest = max((tmp_path / "run").glob("*.pth.tar"), key=lambda path: path.stat().st_mtime_ns)
        saved.append(torch.load(newest, weights_only=True))
    before, after = saved
    task = task_of(data)
    batches = task.build_data(torch.device("cpu"))
    batches.set_epoch(*divmod(step - 1, 4))
    views = task.config.views
    pixels = torch.cat(next(iter(batches))).double() / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (views.mean, views.std))
    module = task.build_module().double()
    module.load_state_dict({n.removeprefix("module."): t for n, t in before["state_dict"].items()})
    x, y = F.normalize(module.encoder_q((pixels - mean) / std), dim=1).chunk(2)
    assert len(x) == images
    (reference.align(x, y, 2) + (reference.uniform(x, 2) + reference.uniform(y, 2)) / 2).backward()
    for i, (name, weight) in enumerate(module.named_parameters()):
        buffer = before["optimizer"]["state"][i]["momentum_buffer"]
        moved = 0.9 * buffer + weight.grad + 1e-4 * weight
        wanted = (weight - lr * moved).float()
        torch.testing.assert_close(after["state_dict"][f"module.{name}"], wanted, atol=1e-5, rtol=0)


# ---- Data


def test_an_epoch_ends_in_a_smaller_batch() -> None:
    """Every sample once; one that is left alone is left out."""
    for length, sizes in ((22, [8, 8, 6]), (16, [8, 8]), (17, [8, 8]), (18, [8, 8, 2])):
        batches = EpochBatches(length, 8, seed=0, keep_last=True)
        assert [len(batch) for batch in batches] == sizes
        assert len(batches) == batches.batches_per_epoch() == len(sizes)
        seen = [index for batch in batches for _, index in batch]
        assert len(set(seen)) == sum(sizes)
        batches.set_epoch(0, 1)
        assert [len(batch) for batch in batches] == sizes[1:]
    assert [len(b) for b in EpochBatches(22, 8, seed=0)] == [8, 8]


def test_views_are_grey_after_the_jitter_and_not_blurred() -> None:
    recipe = in_batch_recipe(64)
    assert not recipe.grey_before_jitter and recipe.blur_p == 0 and recipe.jitter_p == 1
    assert (recipe.jitter, recipe.grey_p) == ((0.4, 0.4, 0.4, 0.4), 0.2)
    assert recipe.crop_scale == (0.08, 1.0) and recipe.image_size == 64


# ---- Command line


def test_defaults_are_those_of_the_data_set(tmp_path) -> None:
    stl = in_batch_config(["--dataset", "stl10", "--device", "cpu", str(tmp_path)])
    assert (stl.optim.batch_size, stl.optim.lr, stl.schedule.schedule) == (
        768,
        0.36,
        (155, 170, 185),
    )
    assert stl.to_flat()["objective"] == (
        "1 * align(alpha=2) + 1 * uniform(t=2, mean of both views)"
    )
    flags = ["-a", "depth_cnnx0.05", "--device", "cpu"]
    nyu = in_batch_config(["--dataset", "nyu", *flags, str(tmp_path)])
    assert (nyu.optim.batch_size, nyu.optim.lr, nyu.views.image_size) == (128, 0.06, 128)
    assert (nyu.schedule.epochs, nyu.schedule.schedule) == (400, (310, 340, 370))
    assert nyu.saving.save_dir.name.startswith("inbatch-depth_cnnx0.05-1align2-1unif2-b128-2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-size 1", "--batch-size 1 has no second image"),
        ("--dim 0", "--dim must be at least 1, got 0"),
        ("--contr-tau 0", "--contr-tau must be positive, got 0"),
        ("--unif-t -1", "--unif-t must be positive, got -1"),
        ("--align-alpha 0.5", "--align-alpha must be at least 1"),
        ("--align-w 0 --unif-w 0", "all loss weights are zero"),
        ("--align-w -1", "--align-w must be a number of at least 0"),
        ("--image-size 14", "small_alexnetx0.05 needs images of at least 15 pixels, got 14"),
        ("--accumulate 2", "--accumulate 2 splits the batch"),
        ("--supervised --align-w 1", "by cross-entropy alone; leave out --align-w"),
        ("--supervised --dataset nyu", "--supervised needs labels"),
        ("--lr fast", "expected a number or auto, got 'fast'"),
        ("-a small_alexnetx", "unknown arch 'small_alexnetx'"),
    ],
)  # fmt: skip
def test_what_is_refused_before_work_starts(data, capsys, flags, message) -> None:
    status, line = refusal(train_in_batch.main, [*SMALL, *flags.split(), data], capsys)
    assert status == 2 and message in line


def test_supervised_images_without_labels_are_refused(tmp_path, elsewhere, capsys) -> None:
    from helpers import write_images

    write_images(tmp_path / "data", {"train": 10}, size=16)
    flags = [*SMALL, "--supervised", "--save-dir", tmp_path / "run", tmp_path / "data"]
    status, line = refusal(train_in_batch.main, flags, capsys)
    assert status == 1 and "has no labels" in line


# ---- Runs


def trained(folder: Path, data: Path, *flags: str) -> Path:
    train_in_batch.main([*SMALL, *flags, "--save-dir", str(folder), str(data)])
    return folder


def test_a_run_resumes_within_an_epoch_bit_for_bit(data, tmp_path, elsewhere, capsys) -> None:
    """30 images, batches of 8: the last batch of 6 is cut off and made up for."""
    flags = ["--epochs", "2", "--contr-w", "1", "--knn-every", "2"]
    whole = trained(tmp_path / "whole", data, *flags)
    facts = capsys.readouterr().out
    formula = (
        "1 * InfoNCE(tau=0.5, in batch) + 1 * align(alpha=2) + 1 * uniform(t=2, mean of both views)"
    )
    for text in (formula, "the last batch has 6", "2 x 8 views", "lr: 0.00375, 0.12 x batch size"):
        assert text in facts
    for steps in (["--max-steps", "3"], ["--max-steps", "7"], []):
        trained(tmp_path / "cut", data, *flags, *steps, "--save-steps", "1", "--resume", "auto")
    first, second = (
        torch.load(folder / "checkpoint_0001.pth.tar", weights_only=True)
        for folder in (whole, tmp_path / "cut")
    )
    for content in (first, second):
        del content["args"]
    assert differences(first, second) == []
    lines = read_log(whole)
    assert len(lines) == 8 and {"contr", "align", "unif", "loss"} <= lines[0].keys()
    assert (
        read_log(whole, "knn")
        and {"alignment", "uniformity"} <= read_log(whole, "metrics")[0].keys()
    )
    assert json.loads((whole / "args.json").read_text())["steps_per_epoch"] == 4


def test_another_objective_does_not_resume(data, tmp_path, elsewhere, capsys) -> None:
    run = trained(tmp_path / "run", data, "--epochs", "1", "--max-steps", "1", "--knn-every", "0")
    again = [*SMALL, "--epochs", "1", "--save-dir", run, "--resume", "auto"]
    for flags, change in (
        (["--unif-t", "3"], "uniform(t=3"),
        (["--dim", "4"], "dim: 8 before, 4 now"),
        (["--drop-last"], "drop_last: False before, True now"),
    ):
        status, line = refusal(train_in_batch.main, [*again, *flags, data], capsys)
        assert status == 1 and "other arguments" in line and change in line


def test_other_groups_of_batch_norm_are_another_run(data) -> None:
    """A process takes statistics over its share, so another number of them learns otherwise."""
    one = in_batch_config([*SMALL, str(data)])
    two = dataclasses.replace(one, placement=dataclasses.replace(one.placement, processes=2))
    assert learning_changes(one.to_flat(), two.to_flat()) == ["bn_group_size: 8 before, 4 now"]


def test_the_folder_of_another_task_does_not_resume(data, tmp_path, elsewhere, capsys) -> None:
    """Of the same arch, and where changes are allowed; MoCo's files say nothing of their task."""
    arch = shlex.split("-a resnet8x2s2 --epochs 1 --max-steps 1 --knn-every 0")
    run = trained(tmp_path / "run", data, *arch)
    moco = tmp_path / "moco"
    words = [*arch, *shlex.split("--image-size 16 --batch-size 8 --moco-k 8 -j 0 --device cpu")]
    main_moco.main([*words, "--save-dir", str(moco), str(data)])
    on = ["--resume", "auto", "--allow-changes", "--save-dir"]
    capsys.readouterr()
    for main, argv, tasks in (
        (main_moco.main, [*words, *on, run, data], "of the task in-batch, this run of moco"),
        (train_in_batch.main, [*SMALL, *arch, *on, moco, data], "moco, this run of in-batch"),
    ):
        status, line = refusal(main, argv, capsys)
        assert status == 1 and tasks in line


def test_an_untrained_encoder_has_statistics_and_starts_another(
    data, tmp_path, elsewhere, capsys
) -> None:
    run = trained(tmp_path / "run", data, "--epochs", "1", "--max-steps", "0", "--knn-every", "0")
    assert "batch norm has the statistics of 4 batches, 60 views" in capsys.readouterr().out
    (file,) = run.glob("*.pth.tar")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert state["module.encoder_q.conv1.1.running_mean"].abs().max() > 0
    flags = ["--supervised", "--epochs", "1", "--knn-every", "0", "--init-from", str(file)]
    other = trained(tmp_path / "supervised", data, *flags)
    out = capsys.readouterr().out
    assert "the projection head is the file's" in out and "cross-entropy of a linear" in out
    assert "cross_entropy" in read_log(other)[0]


def test_the_collapse_warning_has_the_weight_that_excludes_it(data) -> None:
    (line,) = collapse_warning(task_of(data, "--align-w", "3").config.objective).values()
    assert "3, is above t * that of uniformity, 2;" in line and "at least 1.5" in line
    for flags in (
        [],
        ["--align-w", "3", "--contr-w", "1"],
        ["--align-w", "3", "--align-alpha", "1"],
    ):
        assert collapse_warning(task_of(data, *flags).config.objective) == {}


def test_checkpoints_are_measured_and_named(data, tmp_path, elsewhere) -> None:
    """By the views that it was trained with; load_encoder names the task."""
    run = trained(tmp_path / "run", data, "--epochs", "1", "--knn-every", "0")
    file = str(run / "checkpoint_0000.pth.tar")
    encoder, info = load_encoder(file)
    assert (info["task"], info["arch"]) == ("in-batch", "small_alexnetx0.05")
    assert load_image_encoder(file).recipe == in_batch_recipe(16)
    out = tmp_path / "measure.json"
    held_out = tmp_path / "held_out"
    write_images(held_out, {".": 40})
    flags = ["--out", str(out), "--intervals", "--device", "cpu", "-j", "0"]
    load_script("measure_align_uniform").main([file, str(held_out), *flags])
    report = json.loads(out.read_text())
    assert report["layer"] == "projection" and report["layers"].keys() == {"projection", "backbone"}
    assert "uniformity is the mean over both views, as in training" in report["notes"]
    loading = Loading(torch.device("cpu"), 8, 0)
    views, _ = extract(load_image_encoder(file), FolderImages(held_out), loading, views=2)
    x, y = (view["projection"] for view in views)
    mean = (uniformity(x, 2) + uniformity(y, 2)) / 2
    assert report["uniformity"] == pytest.approx(mean, rel=1e-4)
    assert report["uniformity"] != pytest.approx(uniformity(x, 2), rel=1e-4)
    low, high = report["layers"]["projection"]["intervals"]["uniformity"]["2"]
    assert (low, high) == pytest.approx(uniformity_interval(x, 2, second_view=y), rel=1e-3)


@pytest.mark.long
def test_checkpoints_are_exported(data, tmp_path, elsewhere, capsys) -> None:
    pytest.importorskip("onnx")
    run = trained(tmp_path / "run", data, "--max-steps", "1", "--knn-every", "0")
    file = str(run / "step_00000001.pth.tar")
    encoder, _ = load_encoder(file)
    load_script("convert").main([file, "--to", "onnx", str(tmp_path / "encoder.onnx")])
    assert "small_alexnetx0.05" in capsys.readouterr().out
    runtime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 3, 16, 16)
    session = runtime.InferenceSession(str(tmp_path / "encoder.onnx"))
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), encoder(images), rtol=1e-4, atol=1e-5)


def test_a_giant_batch_is_refused_before_it(data, elsewhere, monkeypatch, capsys) -> None:
    """Both views go through the encoder, and all pairs of a large batch are alive at once."""
    argv = ["-a", "small_alexnetx0.125", "--image-size", 32, "--batch-size", 16, "--save-dir", "r"]
    argv += ["--epochs", 1, "--device", "cpu", data]
    config, taken = in_batch_config([str(word) for word in argv]), []
    for batch in (8, 16, 16384, 32768):
        larger = replace(config, optim=replace(config.optim, batch_size=batch))
        taken.append(InBatchTask(larger).rehearse().step)
    assert 1.5 < taken[1] / taken[0] < 2.5 and taken[2] > 4 * 4 * 16384**2
    assert taken[3] - 2 * taken[2] > 4 * 16384**2, "pairs grow with the square"
    monkeypatch.setattr(feasible, "memory_of", lambda _: Memory(2**20, 2**20))
    status, line = refusal(load_script("train_in_batch").main, argv, capsys)
    assert status == 1 and "a step takes about" in line and not Path("r").exists()
    assert "--moco-k" not in line
