"""plot_features.py: every figure from files and folders, and a line for every bad one."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import finish, load_script, refusal, start_python, write_images
from matplotlib.offsetbox import AnnotationBbox
from run_folders import ALIGN, NCE, make_measure, make_probe, make_run

from moco import runs
from moco.evaluate import feature_figures
from moco.evaluate.feature_files import FeatureSet, read_features, write_features
from scripts import plot_features


def unit(n: int, dim: int = 2, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def make_features(path: Path, n: int = 30, dim: int = 2, **arrays) -> Path:
    """As extract_features.py writes them, with a second view; an array None is left out."""
    arrays = {
        "features": unit(n, dim), "features_2": unit(n, dim, 1), "labels": np.arange(n) % 3,
        "classes": np.array(["cat", "dog", "ship"]), "paths": np.array(["x"] * n), **arrays,
    }  # fmt: skip
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def draw(*words: object, tmp_path: Path, name: str = "figure.png") -> bytes:
    out = tmp_path / name
    plot_features.main([*map(str, words), "--out", str(out)])
    return out.read_bytes()


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    return lambda *words: refusal(
        plot_features.main, [*words, "--out", tmp_path / "refused.png"], capsys
    )


def test_figure_4_puts_features_beside_known_distributions(tmp_path) -> None:
    figure = feature_figures.draw_figure_4([make_features(tmp_path / "me.npz")])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0].startswith("me\nmean potential ") and any("uniform" in t for t in titles[2:])


def test_png_and_svg_in_one_go(tmp_path) -> None:
    words = ["10", "--out", tmp_path / "a.png", tmp_path / "a.SVG"]
    plot_features.main(list(map(str, words)))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (tmp_path / "a.SVG").read_bytes()
    assert draw("11", tmp_path=tmp_path, name="b.svg").count(b"<g id=") > 5


def test_unit_rows_are_asked_for_and_made(tmp_path, refused) -> None:
    path = make_features(tmp_path / "a.npz", features=3 * unit(30), features_2=2 * unit(30, seed=1))
    status, line = refused("3", path)
    assert status == 1 and "unit length" in line
    made = draw("3", path, "--normalize", tmp_path=tmp_path, name="a.png")
    (tmp_path / "a.npz").unlink()
    make_features(tmp_path / "a.npz")
    assert made == draw("3", tmp_path / "a.npz", tmp_path=tmp_path, name="b.png")


def test_files_of_one_name_are_told_apart() -> None:
    assert feature_figures.short_names(["x/f.npz", "y/f.npz"]) == ["x/f", "y/f"]
    assert feature_figures.short_names(["x/f.npz", "x/g.npz"]) == ["f", "g"]


def test_classes_by_name_and_number(tmp_path, refused) -> None:
    path = make_features(tmp_path / "a.npz")
    by_name = draw("3", path, "--classes", "ship", tmp_path=tmp_path)
    assert by_name == draw("3", path, "--classes", "2", tmp_path=tmp_path)
    assert by_name != draw("3", path, "--classes", "cat", tmp_path=tmp_path)
    status, line = refused("3", path, "--classes", "bird")
    assert status == 1 and "bird" in line and "cat, dog, ship" in line
    status, line = refused("3", path, "--classes", "7")
    assert status == 1 and "no features of class" in line


def test_map_of_many_dimensions(tmp_path) -> None:
    pytest.importorskip("sklearn")
    path = make_features(tmp_path / "a.npz", n=40, dim=8, features_2=None)
    first = draw("map", path, "--classes", "cat", tmp_path=tmp_path)
    assert first == draw("map", path, "--classes", "cat", tmp_path=tmp_path)
    assert first != draw("map", path, "--classes", "cat", "--most", "20", tmp_path=tmp_path)
    unlabelled = make_features(tmp_path / "b.npz", n=9, dim=8, labels=np.full(9, -1))
    draw("map", unlabelled, tmp_path=tmp_path)


def test_a_map_of_few_images_draws_them(tmp_path, refused) -> None:
    """Those that the file names, also with names in safetensors."""
    names = [str(path.relative_to(tmp_path)) for path in write_images(tmp_path, {"a": 6}, size=8)]
    path = make_features(tmp_path / "a.npz", n=6, paths=np.array(names))
    plain = feature_figures.draw_map(str(path))
    drawn = feature_figures.draw_map(str(path), images=str(tmp_path))
    boxes = [c for c in drawn.axes[0].get_children() if isinstance(c, AnnotationBbox)]
    assert len(boxes) == 6 and plain.axes[0].findobj(AnnotationBbox) == []
    first = np.asarray(boxes[0].offsetbox.get_data())
    assert first.shape == (48, 48, 3) and first.std() > 0
    features = torch.from_numpy(unit(6))
    write_features(tmp_path / "a.safetensors", FeatureSet(features, paths=names))
    assert read_features(tmp_path / "a.safetensors").paths == names
    assert draw("map", path, "--images", tmp_path, tmp_path=tmp_path)[:4] == b"\x89PNG"
    many = make_features(tmp_path / "many.npz", n=301)
    for words, reason in (
        (["map", many, "--images", tmp_path], "301 images would cover each other, the most is 300"),
        (["map", make_features(tmp_path / "b.npz", paths=None), "--images", tmp_path], "no names"),
        (["map", make_features(tmp_path / "c.npz"), "--images", tmp_path], "cannot read image"),
        (["map", path, "--images", tmp_path / "none"], "--images: no such folder"),
        (["4", path, "--images", tmp_path], "--images: is for a map"),
    ):
        assert reason in refused(*words)[1]


def test_map_without_scikit_learn(tmp_path, refused, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    status, line = refused("map", make_features(tmp_path / "a.npz", dim=8))
    assert status == 1 and "pip install scikit-learn" in line
    draw("map", make_features(tmp_path / "b.npz"), tmp_path=tmp_path)  # two dimensions need none


@pytest.mark.parametrize("figure", ["10", "3", "5"])
def test_without_matplotlib(figure, tmp_path, refused, monkeypatch) -> None:
    """Before any file or run is looked at."""
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, line = refused(figure, *([] if figure == "10" else [tmp_path / "missing"]))
    assert status == 1 and "needs the package matplotlib: pip install matplotlib" in line


def test_commands_that_draw_nothing_need_no_package_for_it(tmp_path) -> None:
    """--help of all, and measuring and reading features."""
    np.savez(tmp_path / "a.npz", features=unit(9))
    code = """
import sys
for name in ("matplotlib sklearn timm onnx tensorboard scipy jinja2 markupsafe safetensors "
             "pyarrow h5py").split():
    sys.modules[name] = None
import importlib
scripts = ("compare_runs evaluate_depth evaluate_sentences neighbours preflight release run_recipe "
           "sweep train_in_batch train_sentences transfer").split()
for name in ["main_lincls", "main_moco", *(f"scripts.{script}" for script in scripts)]:
    try:
        importlib.import_module(name).main(["--help"])
    except SystemExit as ended:
        assert ended.code == 0
from scripts import extract_features, measure_align_uniform, plot_features, theorem1
for script in (extract_features, measure_align_uniform, plot_features, theorem1):
    script.build_parser().format_help()
measure_align_uniform.main(["--features", sys.argv[1], "--device", "cpu"])
try:
    import align_uniform.figures
except ImportError as error:
    print(error, error.name)
"""
    status, out, err = finish(start_python("-c", code, tmp_path / "a.npz", cwd=tmp_path))
    assert status == 0, err
    assert "uniformity, t 2" in out
    assert out.endswith("needs the package matplotlib: pip install matplotlib matplotlib\n")


@pytest.mark.parametrize(
    ("command", "argv", "package", "distribution"),
    [
        ("compare_runs", ["RUN", "--out", "a.html"], "jinja2", "jinja2"),
        ("compare_runs", ["RUN", "--out", "a.html"], "scipy.stats", "scipy"),
        ("neighbours", ["missing", "."], "jinja2", "jinja2"),
        ("release", ["--verify", "."], "jinja2", "jinja2"),
        ("transfer", ["missing", "--data", "missing"], "scipy.stats", "scipy"),
        ("evaluate_sentences", [".", "--mr", "."], "sklearn.linear_model", "scikit-learn"),
        ("extract_features", ["missing", ".", "a.safetensors"], "safetensors.torch", "safetensors"),
    ],
)
def test_without_the_package_that_a_command_needs(
    command, argv, package, distribution, tmp_path, capsys, monkeypatch
) -> None:
    """One line names it, before any file is looked at."""
    monkeypatch.chdir(tmp_path)
    for name in ("report", "compare"):  # imported again
        monkeypatch.delitem(sys.modules, f"moco.runs.{name}", raising=False)
        monkeypatch.delattr(runs, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    status, line = refusal(load_script(command).main, argv, capsys)
    assert status == 1 and f"needs the package {distribution}: pip install {distribution}" in line


def test_a_map_has_equally_many_of_each_class() -> None:
    labels = torch.tensor([0] * 90 + [1] * 8 + [2] * 2)
    chosen = feature_figures.balanced_rows(labels, 100, 20, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [10, 8, 2]
    assert torch.equal(chosen, feature_figures.balanced_rows(labels, 100, 20, seed=0))
    assert not torch.equal(chosen, feature_figures.balanced_rows(labels, 100, 20, seed=1))
    assert feature_figures.balanced_rows(None, 100, 2000, seed=0).tolist() == list(range(100))


BAD = {
    "NaN": ({"features": np.full((30, 2), np.nan, np.float32)}, "first in row 0"),
    "three dimensions": ({"features": unit(30, 3), "features_2": None}, "--moco-dim 2"),
    "zero": ({"features": np.zeros((30, 2), np.float32)}, "row 0 of features is zero"),
    "one row": ({"features": unit(1), "features_2": None, "labels": None}, "at least 2 rows"),
}


def test_bad_features_are_one_line(tmp_path, refused) -> None:
    """What the reader refuses is in tests/evaluate/test_feature_files.py."""
    for name, (arrays, reason) in BAD.items():
        path = make_features(tmp_path / "bad.npz", **arrays)
        status, line = refused("3", path)
        assert status == 1 and reason in line and "bad" in line, name
    assert not (tmp_path / "refused.png").exists()


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ("10 --out a.pdf", 2, ".png or .svg"),
        ("10 x.npz --out a.png", 2, "takes no input"),
        ("3 --out a.png", 2, "at least one file of features"),
        ("7 --out a.png", 2, "at least one run folder"),
        ("map a.npz b.npz --out a.png", 2, "one file"),
        ("map a.npz --most 1 --out a.png", 2, "--most"),
        ("map a.npz --seed -1 --out a.png", 2, "--seed"),
        ("4 --t -1 --out a.png", 1, "t must be"),
        ("4 missing.npz --out a.png", 1, "missing.npz"),
        ("10 --out none/a.png", 1, "none"),
    ],
)
def test_commands_that_make_no_sense(words, status, reason, elsewhere, capsys) -> None:
    code, line = refusal(plot_features.main, words.split(), capsys)
    assert code == status and reason in line


def sweep(root: Path) -> Path:
    # A term that is off has the parameter that is the default.
    for i, (align_w, unif_w, t) in enumerate([(1, 0, 3.0), (0.5, 0.5, 2.0), (0, 1, 2.0)]):
        weights = {"contr_w": 0.0, "align_w": align_w, "unif_w": unif_w, "align_alpha": 2.0,
                   "unif_t": t}  # fmt: skip
        run = make_run(root / f"w{i}", f"{align_w} * align + {unif_w} * uniform", **weights)
        make_measure(run, 0.1 * (i + 1), -float(i))
        make_probe(run, 40.0 + i, knn=30.0 + i)
    nce = make_run(root / "nce", NCE, contr_w=1.0, align_w=0.0, unif_w=0.0)
    make_measure(nce, 0.4, -2.0)
    return root


def test_weights_sweep_from_run_folders(tmp_path, capsys) -> None:
    runs = [sweep(tmp_path / "runs")]
    accuracy, alignment, uniformity = plot_features.draw_runs("7", runs).axes
    assert accuracy.get_ylabel().startswith("linear")
    for axes, expected in (
        (accuracy, [42, 41, 40]),
        (alignment, [0.3, 0.2, 0.1]),
        (uniformity, [math.exp(-2), math.exp(-1), 1]),
    ):
        shares, values = axes.lines[0].get_data()
        assert list(shares) == [0, 0.5, 1] and list(values) == pytest.approx(expected)
    assert "nce" in capsys.readouterr().err, "left out, and said"
    assert accuracy.get_legend() is None, "one line"
    other = make_run(tmp_path / "runs" / "t5", "other", contr_w=0.0, align_w=1, unif_w=1,
                     align_alpha=2.0, unif_t=5.0)  # fmt: skip
    make_measure(other, 0.5, -3.0)
    alignment = plot_features.draw_runs("7", runs).axes[1]
    lines = {line.get_label(): line.get_data() for line in alignment.lines}
    assert list(lines["alpha 2, t 5"][0]) == [0.5, 1], "alignment alone is an end of both lines"
    assert list(lines["alpha 2, t 2"][0]) == [0, 0.5, 1]


def test_kinds_of_accuracy_are_not_mixed(tmp_path) -> None:
    root = sweep(tmp_path / "runs")
    path = root / "w1-lincls" / "lincls.json"
    content = json.loads(path.read_text())
    del content["last"]
    path.write_text(json.dumps(content))
    accuracy = plot_features.draw_runs("7", [root]).axes[0]
    assert accuracy.get_ylabel().startswith("k-NN")
    assert list(accuracy.lines[0].get_ydata()) == [32, 31, 30]


def test_figures_of_runs_are_drawn(tmp_path) -> None:
    root = sweep(tmp_path / "runs")
    make_measure(root / "w1", 0.9, -0.5, epoch=2)
    pictures = {figure: draw(figure, root, tmp_path=tmp_path) for figure in ("5", "7", "8")}
    assert len(set(pictures.values())) == 3


def test_trajectories_of_logged_values(tmp_path) -> None:
    run = make_run(tmp_path / "a", ALIGN)
    with open(run / "log.jsonl", "a") as log:
        for step, align in ((4, 0.9), (12, 0.7), (20, 0.4)):
            line = {"kind": "train", "step": step, "alignment": align, "uniformity": -step / 10}
            log.write(json.dumps(line) + "\n")
    (axes,) = plot_features.draw_runs("8", [run]).axes
    places = [line.get_data() for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(xs) for xs, _ in places] == [[0.9, 0.7, 0.4]]
    assert list(places[0][1]) == pytest.approx([math.exp(u) for u in (-0.4, -1.2, -2.0)])
    assert [text.get_text() for text in axes.texts] == ["epoch 1", "epoch 5"]


def test_trajectories_begin_at_the_encoder_that_runs_started_from(tmp_path, capsys) -> None:
    start = make_run(tmp_path / "s" / "start", NCE)
    make_measure(start, 0.5, -1.0)
    make_probe(start, 20.0)
    for seed, name in enumerate(("a", "b")):
        run = make_run(
            tmp_path / "s" / name, name, init_from=str(start / "checkpoint_0004.pth.tar")
        )
        make_measure(run, 0.1 * seed, -2.0)
        make_probe(run, 30.0 + seed)
    figure = plot_features.draw_runs("8", [tmp_path / "s"])
    drawn = [line.get_data() for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert [list(xs) for xs, _ in drawn] == [[0.5, 0.0], [0.5, 0.1]]
    assert [list(ys) for _, ys in drawn] == [pytest.approx([math.exp(-1), math.exp(-2)])] * 2
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == ["epoch 5", "epoch 5", "start"]
    assert "start has 1 measured epoch" in capsys.readouterr().err

    with open(start / "log.jsonl", "a") as log:  # of batches: other numbers than those measured
        for step, align in ((4, 0.9), (20, 0.8)):
            line = {"kind": "train", "step": step, "alignment": align, "uniformity": -1.5}
            log.write(json.dumps(line) + "\n")
    lines = plot_features.draw_runs("8", [tmp_path / "s"]).axes[0].lines
    paths = [list(line.get_xdata()) for line in lines if len(line.get_xdata()) == 2]
    assert sorted(paths) == [[0.5, 0.0], [0.5, 0.1], [0.9, 0.8]]


def test_many_encoders_are_drawn_without_names(tmp_path) -> None:
    for i in range(17):
        make_measure(make_run(tmp_path / f"run{i}", f"o{i}"), 0.1 * i, -1.0)

    def names(*folders: Path) -> list[str]:
        return [text.get_text() for text in plot_features.draw_runs("5", folders).axes[0].texts]

    assert names(tmp_path / "run0", tmp_path / "run1") == ["run0", "run1"]
    assert not any(names(tmp_path))


def test_runs_that_give_no_figure(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "a", ALIGN)
    for figure, reason in (("5", "alignment and uniformity"), ("7", "measure"), ("8", "two")):
        words = [figure, run, "--out", tmp_path / "a.png"]
        with pytest.raises(SystemExit) as stop:
            plot_features.main(list(map(str, words)))
        assert stop.value.code == 1 and reason in capsys.readouterr().err.splitlines()[-1]
    words = ["5", tmp_path / "missing", "--out", tmp_path / "a.png"]
    with pytest.raises(SystemExit):
        plot_features.main(list(map(str, words)))
    assert "is no folder" in capsys.readouterr().err
