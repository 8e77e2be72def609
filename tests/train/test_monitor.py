"""What a run shows while it trains: numbers, distributions, pictures, on the screen and on disk."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TinyNet, pretrain, read_log, two_views
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from align_uniform.bounds import uniformity_infimum
from moco.builder import MoCo, MoCoLosses
from moco.evaluate.neighbours import CAPTION, GAP, THUMBNAIL
from moco.log import RunLog
from moco.runs.folder import read_runs
from moco.stop import StopRequest
from moco.tasks import monitor


def train(data: Path, run: Path, *flags: object) -> Path:
    pretrain(data, run, "--moco-dim", 16, "--knn-every", 2, *flags)
    return run


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "au": train(data, folder / "au", "--epochs", 3),
        "nce": train(data, folder / "nce", "--epochs", 3, "--moco-t", 0.2),
    }


def board(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0, "histograms": 0})
    return events.Reload()


# ---- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [{"contr_tau": 0.2}, {"align_alpha": 1, "unif_t": 3}])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_they_are_those_of_the_definitions(terms, symmetric, parts) -> None:
    """In float64, pair by pair; alpha and t are those of the metric, not of the objective. Two
    views of one image are no pair of the uniformity."""
    torch.manual_seed(0)
    moco = MoCo(lambda num_classes: TinyNet(num_classes, batch_norm=False), 8, 64, **terms)
    im_q, im_k = two_views(0, 12)
    losses = MoCoLosses.mean(
        [moco(im_q, im_k, part=part, parts=parts, symmetric=symmetric) for part in range(parts)]
    )
    distances, potentials = [], []
    with torch.no_grad():
        for of_q, of_k in [(im_q, im_k), (im_k, im_q)][: 1 + symmetric]:
            q = F.normalize(moco.encoder_q(of_q).double(), dim=1)
            k = F.normalize(moco.encoder_k(of_k).double(), dim=1)
            distances += [((a - b) ** 2).sum().item() for a, b in zip(q, k, strict=True)]
            for part in q.chunk(parts):
                potentials += [
                    math.exp(-2 * ((part[i] - part[j]) ** 2).sum().item())
                    for i in range(len(part))
                    for j in range(i)
                ]
    found = monitor.batch_metrics(losses)
    assert found["alignment"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert found["uniformity"] == pytest.approx(math.log(np.mean(potentials)), rel=1e-5)
    assert found["uniformity_infimum"] == uniformity_infimum(8, 2)


@pytest.mark.parametrize("name", ["au", "nce"])
def test_every_print_step_has_them_whatever_the_objective(name, runs) -> None:
    lines = read_log(runs[name], "metrics")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert {line["uniformity_infimum"] for line in lines} == {uniformity_infimum(16, 2)}
    if name == "au":  # whose alignment term has alpha 2 as well
        for line, step in zip(lines, read_log(runs[name]), strict=True):
            assert line["alignment"] == pytest.approx(step["align"], rel=1e-5)


def test_tensorboard_has_every_number_of_the_json_lines(runs) -> None:
    for name, terms in (("au", ["align", "unif"]), ("nce", ["contr", "contr_top1", "contr_top5"])):
        events = board(runs[name])
        wanted = ["loss", "lr", "images_per_s", "data_share", "grad_norm", *terms]
        wanted = {f"train/{word}" for word in wanted} | {"features/std", "knn/top1", "knn/seconds"}
        wanted |= {f"metrics/{n}" for n in ("alignment", "uniformity", "uniformity_infimum")}
        assert wanted <= set(events.Tags()["scalars"])
        for kind in ("train", "knn", "features", "metrics"):
            for line in read_log(runs[name], kind):
                for word in line:
                    if f"{kind}/{word}" in wanted:
                        shown = {e.step: e.value for e in events.Scalars(f"{kind}/{word}")}
                        assert shown[line["step"]] == pytest.approx(line[word], rel=1e-5)


def test_the_readers_of_run_folders_find_them(runs) -> None:
    found, left_out = read_runs(list(runs.values()))
    assert left_out == [] and len(found) == 2
    for run in found:
        curves = run.scalars()
        assert len(curves["alignment"][0]) == len(curves["uniformity"][0]) == 9
        assert (
            curves["knn top1"][0] == [0, 2, 3]
            and run.value("k-NN top-1") == curves["knn top1"][1][-1]
        )
        assert run.value("uniformity") == read_log(run.folder, "metrics")[-1]["uniformity"]
        assert not {"uniformity_infimum", "knn bank", "knn seconds"} & curves.keys()


# ---- Pictures ------------------------------------------------------------------------------------


def pictures(run: Path) -> list[np.ndarray]:
    shown = [event.encoded_image_string for event in board(run).Images("views")]
    return [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in shown]


@pytest.fixture(scope="module")
def resumed(data, tmp_path_factory) -> tuple[Path, tuple[torch.Tensor, torch.Tensor]]:
    """A run that was stopped after four steps and resumed, and its first batch."""
    seen, forward = [], MoCo.forward

    def watched(self, im_q, im_k, **more):
        seen.append((im_q, im_k))
        return forward(self, im_q, im_k, **more)

    run = tmp_path_factory.mktemp("resumed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoCo, "forward", watched)
        train(data, run, "--epochs", 2, "--max-steps", 4)
        assert len(pictures(run)) == 1
        train(data, run, "--epochs", 2, "--resume", "auto")
    return run, seen[0]


def test_the_first_views_are_shown_once_side_by_side(resumed) -> None:
    """Pixel for pixel what the encoders get, before it is normalised."""
    run, first = resumed
    (picture,) = pictures(run)
    assert picture.shape == (2 * 34 + 2, 4 * 66 + 2, 3)  # 8 pairs of 32 pixels, 4 in a row
    for i, (q, k) in enumerate(zip(*first, strict=True)):
        top, left = 2 + 34 * (i // 4), 2 + 66 * (i % 4)
        pair = picture[top : top + 32, left : left + 64]
        assert np.array_equal(pair, torch.cat([q, k], dim=2).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["au", "nce"])
def test_distributions_of_each_epoch(name, runs) -> None:
    """Of the last batch: 8 positive pairs, 8 x 64 similarities."""
    lines, events = read_log(runs[name], "histograms"), board(runs[name])
    assert [line["step"] for line in lines] == [3, 6, 9]
    last = {line["step"]: line["alignment"] for line in read_log(runs[name], "metrics")}
    for tag, count, least, most in (
        ("positive_distance", 8, 0, 2),
        ("queue_similarity", 8 * 64, -1, 1),
    ):
        shown = events.Histograms(f"features/{tag}")
        assert [event.step for event in shown] == [3, 6, 9]
        for event, line in zip(shown, lines, strict=True):
            assert (line[tag]["least"], line[tag]["most"]) == (least, most)
            assert sum(line[tag]["counts"]) == count == event.histogram_value.num
            assert least <= event.histogram_value.min <= event.histogram_value.max <= most
            if tag == "positive_distance":
                squares = event.histogram_value.sum_squares / count
                assert squares == pytest.approx(last[line["step"]], rel=1e-5)


def test_a_long_queue_is_sampled(tmp_path) -> None:
    torch.manual_seed(0)
    moco = MoCo(lambda num_classes: TinyNet(num_classes), 4, 10_000, align_alpha=2)
    losses = moco(*two_views(0, 6))
    log = RunLog(tmp_path)
    log.histograms(1, monitor.distributions(losses))
    log.close()
    q, _, queue = losses.features()
    sample = q @ queue[:, ::3]  # 3334 of at most 4096
    (line,) = read_log(tmp_path, "histograms")
    counts = torch.histc(sample, bins=40, min=-1, max=1).int().tolist()
    assert line["queue_similarity"]["counts"] == counts and sum(counts) == 6 * 3334


def test_a_sheet_of_neighbours_is_shown_with_each_knn(runs) -> None:
    """Six images of the bank, each with the six nearest."""
    events = board(runs["au"]).Images("neighbours")
    assert [event.step for event in events] == [0, 6, 9]
    row, column = THUMBNAIL + CAPTION + GAP, THUMBNAIL + GAP
    for event in events:
        assert (event.height, event.width) == (GAP + 6 * row, 2 * GAP + 7 * column)
    assert events[0].encoded_image_string != events[2].encoded_image_string


# ---- Tabs of TensorBoard -------------------------------------------------------------------------


def test_the_bound_is_a_curve_in_the_chart_of_uniformity(runs) -> None:
    events = board(runs["nce"])
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    tags = events.Tags()["scalars"]
    drawn = {
        title: sorted(tag for tag in tags if any(re.search(pattern, tag) for pattern in patterns))
        for title, patterns in charts.items()
    }
    assert drawn == {
        "uniformity (t=2) and its infimum": ["metrics/uniformity", "metrics/uniformity_infimum"],
        "alignment (alpha=2)": ["metrics/alignment"],
    }


def test_the_hparams_tab_has_the_run_in_its_own_folder(resumed) -> None:
    """Its settings, and the metrics whose last values it shows; closed only when it has ended."""

    def plugin(run: Path) -> dict[str, plugin_data_pb2.HParamsPluginData]:
        contents = board(run).PluginTagToContent("hparams")
        return {
            tag.rpartition("/")[2]: plugin_data_pb2.HParamsPluginData.FromString(content)
            for tag, content in contents.items()
        }

    run, _ = resumed
    assert [path for path in run.iterdir() if path.is_dir()] == []
    found = plugin(run)
    settings = found["session_start_info"].session_start_info.hparams
    assert settings["lr"].number_value == 0.03 and settings["arch"].string_value == "resnet8"
    assert settings["objective"].string_value.startswith("3 * align(alpha=2)")
    metrics = {info.name.tag for info in found["experiment"].experiment.metric_infos}
    assert {"train/loss", "metrics/alignment", "metrics/uniformity", "knn/top1"} <= metrics
    assert metrics <= set(board(run).Tags()["scalars"])
    assert found["session_end_info"].session_end_info.status == 1  # success


def test_a_run_that_is_stopped_loses_no_point(data, tmp_path, monkeypatch) -> None:
    """TensorBoard's writer holds back what it gets; a resumed run only drops what comes again."""
    run = tmp_path / "run"
    monkeypatch.setattr(StopRequest, "requested", property(lambda self: True))
    with pytest.raises(SystemExit) as stopped:
        train(data, run, "--epochs", 3)
    monkeypatch.undo()
    assert stopped.value.code == 75
    assert [event.step for event in board(run).Scalars("train/loss")] == [1]
    assert "_hparams_/session_end_info" not in board(run).PluginTagToContent("hparams")
    train(data, run, "--epochs", 3, "--resume", "auto")
    assert [event.step for event in board(run).Scalars("train/loss")] == list(range(1, 10))
