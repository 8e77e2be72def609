"""compare_runs.py: what belongs together, what is left out and why, the numbers in the report."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from harness import Processes
from helpers import refusal, write_labelled
from scipy import stats

from scripts import compare_runs
from scripts.run_folders import read_runs, short_names

ALIGN = "3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch pairs)"
NCE = "1 * InfoNCE(tau=0.2)"


def make_run(
    folder: Path, objective: str = ALIGN, seed: int = 0, *, steps: int = 20, **args
) -> Path:
    """A run folder of 5 epochs of 4 steps of 8 images, as main_moco.py leaves it."""
    folder.mkdir(parents=True)
    args = {
        "objective": objective, "seed": seed, "epochs": 5, "batch_size": 8, "images": 35,
        "processes": 1, "arch": "resnet8", "lr": 0.03, "max_steps": None, "schedule": [120, 160],
        "save_dir": str(folder), "print_freq": 2,
        "provenance": {"git": "abc", "torch": "2.15"}, **args,
    }  # fmt: skip
    (folder / "args.json").write_text(json.dumps(args))
    lines = []
    for step in range(2, steps + 1, 2):
        facts = {"epoch": (step - 1) // 4, "loss": 1 / step + seed, "lr": 0.03}
        rates = {"images_per_s": 16.0, "data_share": 0.1}  # 2 steps of 8 images take 1 s
        lines.append({"kind": "train", "step": step, "time": 1e9 + 100 * step, **facts, **rates})
        lines.append({"kind": "features", "step": step, "time": 0, "std": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_probe(
    run: Path,
    last: float,
    *,
    knn: float | None = None,
    epoch: int = 5,
    name: str = "lincls",
    **more,
) -> Path:
    folder = run.with_name(f"{run.name}-{name}")
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"pretrained": "x", "epochs": 100}))
    content = {
        "checkpoint": str(run / f"checkpoint_{epoch - 1:04d}.pth.tar"), "arch": "resnet8",
        "pretrained_epochs": epoch, "best": {"top1": last + 1, "top5": 99.0, "epoch": 3},
        "last": {"top1": last, "top5": 98.0, "epoch": 9}, "protocol": {"lr": 30.0, "seed": 0},
        **more,
    }  # fmt: skip
    if knn is not None:
        content["knn"] = {"top1": knn, "top5": 90.0, "k": 200, "temperature": 0.1, "images": 50}
    (folder / "lincls.json").write_text(json.dumps(content))
    return folder


def make_measure(run: Path, alignment: float, uniformity: float, epoch: int = 5, **more) -> Path:
    path = run / f"measured_{epoch}.json"
    content = {
        "checkpoint": str(run / f"checkpoint_{epoch - 1:04d}.pth.tar"), "layer": "projection",
        "alpha": 2.0, "t": 2.0, "alignment": alignment, "uniformity": uniformity, **more,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


class Page(HTMLParser):
    """What a page says and loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name.split(":")[-1] in ("src", "href", "data", "srcset"):
                self.loaded.append(value)
            assert not name.startswith("on"), f"{tag} {name}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def compare(*paths: object, out: Path, capsys) -> tuple[list[list[str]], str, str]:
    """Rows of the first table on the screen, the whole screen, and the page."""
    compare_runs.main([*map(str, paths), "--out", str(out)])
    screen = capsys.readouterr().out
    lines = screen.split("## Runs\n\n")[1].split("\n\n")[0].splitlines()
    split = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [split[0], *split[2:]], screen, out.read_text(encoding="utf-8")


def column(rows: list[list[str]], name: str) -> list[str]:
    return [row[rows[0].index(name)] for row in rows[1:]]


# ---- Groups and numbers ---------------------------------------------------------------------


@pytest.fixture()
def two_objectives(tmp_path: Path) -> Path:
    """Three seeds of each, with probe, k-NN and measurement."""
    root = tmp_path / "runs"
    for seed, (a, b) in enumerate([(50, 45), (52, 48), (57, 49)]):
        for name, objective, top1 in (("a", ALIGN, a), ("b", NCE, b)):
            run = make_run(root / f"{name}{seed}", objective, seed)
            make_probe(run, top1, knn=top1 - 10)
            make_measure(run, top1 / 100, -top1 / 20)
    return root


def test_seeds_are_one_row_with_mean_and_deviation(two_objectives, tmp_path, capsys) -> None:
    rows, screen, page = compare(two_objectives, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "objective") == [ALIGN, NCE]
    assert column(rows, "seeds") == ["0, 1, 2"] * 2
    deviation = statistics.stdev([50, 52, 57])
    assert column(rows, "linear last")[0] == f"53.00 ± {deviation:.2f}"
    assert column(rows, "linear best")[0] == f"54.00 ± {deviation:.2f}"
    assert column(rows, "k-NN top-1")[1] == f"{112 / 3:.2f} ± {statistics.stdev([45, 48, 49]):.2f}"
    assert column(rows, "alignment")[0] == f"0.530 ± {deviation / 100:.3f}"
    assert column(rows, "uniformity")[0] == f"-2.650 ± {deviation / 20:.3f}"
    # 20 steps at 2 steps a second; the clock of the log, with its pauses, says 1800 s.
    assert column(rows, "hours")[0] == f"{10 / 3600:.3f} ± 0.000"
    assert column(rows, "images/s")[0] == "16 ± 0"
    assert column(rows, "differs from row 1 in") == ["", ""]
    assert "Left out" not in screen
    for text in (ALIGN, NCE, f"53.00 ± {deviation:.2f}", "67.69", "cited"):
        assert text in "".join(Page(page).text) and text in screen


def test_paired_differences_are_by_seed(two_objectives, tmp_path, capsys) -> None:
    shutil.rmtree(two_objectives / "b1")  # seed 1 has no partner now
    _, screen, _ = compare(two_objectives, out=tmp_path / "r.html", capsys=capsys)
    (line,) = [li for li in screen.splitlines() if li.startswith("| 1 − 2 | linear last")]
    assert "| 1 − 2 | linear last | 0, 2 |" in line
    assert f"+6.500 ± {statistics.stdev([5, 8]):.3f} | 0.5 | 0.5 |" in line


def test_seeds_that_start_from_encoders_of_their_own_are_one_row(tmp_path, capsys) -> None:
    for seed in (0, 1):
        start = make_run(tmp_path / f"start-s{seed}" / "pretrain", NCE, seed)
        path = str(start / "checkpoint_0003.pth.tar")
        make_run(tmp_path / f"both-s{seed}" / "pretrain", ALIGN, seed, init_from=path)
    make_run(tmp_path / "alone", ALIGN, 2, init_from="/else/checkpoint_0003.pth.tar")
    rows, _, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    by_seeds = dict(zip(column(rows, "seeds"), column(rows, "objective"), strict=False))
    assert sorted(column(rows, "seeds")) == ["0, 1", "0, 1", "2"] and by_seeds["2"] == ALIGN
    flags = " ".join(column(rows, "differs from row 1 in"))
    assert f"{NCE}, epoch 4" in flags and "/else/checkpoint_0003.pth.tar" in flags
    assert str(tmp_path) not in flags


def test_cross_validation_has_a_column(tmp_path, capsys) -> None:
    folds = {"count": 3, "chosen": {"lr": 10.0, "weight_decay": 0.0}, "settings": [
        {"lr": 1.0, "weight_decay": 0.0, "top1": [40.0] * 3, "mean": 40.0, "std": 0.0},
        {"lr": 99.0, "weight_decay": 0.0, "top1": [None] * 3, "mean": None, "std": None},
        {"lr": 10.0, "weight_decay": 0.0, "top1": [47.0] * 3, "mean": 47.0, "std": 0.0},
    ]}  # fmt: skip
    make_probe(make_run(tmp_path / "a", seed=0), 50.0, folds=folds)
    make_probe(make_run(tmp_path / "b", seed=1), 50.0, folds={**folds, "settings": [1, {}]})
    rows, _, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "linear folds") == ["47.00 (of 1)"]


def test_only_different_objectives_are_tested(tmp_path, capsys) -> None:
    for seed in (0, 1):
        for lr in (0.03, 0.06):
            make_measure(make_run(tmp_path / f"{lr}-{seed}", NCE, seed, lr=lr), lr, -1.0)
    _, screen, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    assert "Paired differences" not in screen


@pytest.mark.parametrize("n", range(1, 9))
def test_sign_flip_test_counts_all_signs(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    differences = (torch.randn(n, generator=generator) + 0.4).tolist()
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=n)
    ]
    expected = sum(s >= abs(sum(differences)) - 1e-12 for s in sums) / 2**n
    assert compare_runs.sign_flip_p(differences) == expected
    assert compare_runs.sign_flip_p([-d for d in differences]) == expected


def test_sign_flip_test_with_ties_and_zeros() -> None:
    assert compare_runs.sign_flip_p([0.1] * 5) == 2 / 32
    assert compare_runs.sign_flip_p([0.0, 0.0]) == 1
    assert compare_runs.sign_flip_p([1.0, -1.0]) == 1
    assert compare_runs.sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert compare_runs.sign_flip_p([1.0] * 40) == 2 / 2**40


def test_rank_correlation_is_scipys() -> None:
    xs, ys = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0]
    assert compare_runs.spearman(xs, ys) == pytest.approx(stats.spearmanr(xs, ys).statistic)
    assert compare_runs.spearman([1, 2], [1, 2]) is None
    assert compare_runs.spearman([1, 1, 1], [1, 2, 3]) is None


def test_rank_correlation_is_reported(two_objectives, tmp_path, capsys) -> None:
    _, screen, page = compare(two_objectives, out=tmp_path / "r.html", capsys=capsys)
    assert "correlation of alignment and linear top-1, last (%): +1.00 (6 encoders)" in screen
    assert "correlation of uniformity and linear top-1, last (%): -1.00 (6 encoders)" in screen
    assert "alignment +1.00, uniformity -1.00 (6 runs)" in page


def test_more_than_the_objective_is_flagged(two_objectives, tmp_path, capsys) -> None:
    make_run(tmp_path / "other", NCE, 0, lr=0.06, processes=8, schedule=[60, 80])
    rows, screen, page = compare(two_objectives, tmp_path / "other", out=tmp_path / "r.html",
                                 capsys=capsys)  # fmt: skip
    assert column(rows, "differs from row 1 in")[:2] == ["", ""]
    flag = column(rows, "differs from row 1 in")[2]
    assert flag.startswith("⚠")
    for text in ("lr 0.06, not 0.03", "processes 8, not 1", "schedule [60, 80], not [120, 160]"):
        assert text in flag
    assert column(rows, "ranks") == ["1", "1", "8"]
    assert "lr 0.06, not 0.03" in page
    # Named in the paired tests as well, as soon as there are two seeds.
    make_run(tmp_path / "other1", NCE, 1, lr=0.06, processes=8, schedule=[60, 80])
    for seed in (0, 1):
        make_probe(tmp_path / f"other{seed or ''}", 40 + seed)
    _, screen, _ = compare(two_objectives, tmp_path, out=tmp_path / "r.html", capsys=capsys)
    (line,) = [li for li in screen.splitlines() if li.startswith("| 1 − 3 | linear last")]
    assert {"lr", "processes", "schedule"} <= set(re.findall(r"\w+", line.split("⚠")[1]))


def test_row_1_is_of_the_recipe_that_most_have(two_objectives, tmp_path, capsys) -> None:
    make_run(tmp_path / "alone", ALIGN, 0, lr=1.0)
    rows, _, _ = compare(tmp_path / "alone", two_objectives, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "differs from row 1 in") == ["", "", "⚠ lr 1, not 0.03"]


def test_probes_made_otherwise_are_named(two_objectives, tmp_path, capsys) -> None:
    path = two_objectives / "a0-lincls" / "lincls.json"
    content = json.loads(path.read_text())
    content["protocol"]["lr"] = 7.5
    content["knn"]["k"] = 20
    path.write_text(json.dumps(content))
    _, screen, page = compare(two_objectives, out=tmp_path / "r.html", capsys=capsys)
    for text in ("linear evaluation: lr is 7.5 or 30.0", "k-NN: k is 20 or 200"):
        assert text in screen and text in page


def test_values_logged_while_training_are_used_where_nothing_else_is(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "a")
    with open(run / "log.jsonl", "a") as log:
        line = {"kind": "train", "step": 20, "alignment": 0.4, "uniformity": -2.5}
        log.write(json.dumps(line) + "\n")
        for step, top1 in ((8, 30.0), (20, 33.0)):
            log.write(json.dumps({"kind": "knn", "step": step, "top1": top1, "top5": 80.0}) + "\n")
    rows, _, page = compare(run, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "k-NN top-1") == ["33.00"]
    assert column(rows, "alignment") == ["0.400"] and column(rows, "uniformity") == ["-2.500"]
    assert "knn top1" in page, "a curve"
    other = make_run(tmp_path / "b", NCE)
    make_measure(other, 0.5, -3.0)
    make_probe(other, 60.0, knn=44.0)
    _, screen, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    for title in ("k-NN", "alignment and uniformity"):
        assert f"⚠ {title}: logged while training for 1 of 2 runs" in screen
    shutil.rmtree(other)
    make_measure(run, 0.5, -3.0)
    make_probe(run, 60.0, knn=44.0)
    rows, _, _ = compare(run, f"{run}-lincls", out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "k-NN top-1") == ["44.00"] and column(rows, "alignment") == ["0.500"]


# ---- Which probe belongs to which run -------------------------------------------------------


def test_probes_find_their_run_after_a_move(two_objectives, tmp_path, capsys) -> None:
    moved = two_objectives.rename(tmp_path / "elsewhere")
    rows, screen, _ = compare(moved, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "linear last")[0].startswith("53.00")
    assert column(rows, "alignment")[0].startswith("0.530")
    assert "Left out" not in screen


def test_probe_within_its_run_folder_and_single_folders_given(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "a", save_dir="/gone/a")
    probe = make_probe(run, 61.0, checkpoint="/lost/checkpoint_0004.pth.tar")
    probe.rename(run / "lincls")
    other = make_run(tmp_path / "b", NCE)
    given = make_probe(other, 62.0)
    rows, _, _ = compare(run, other, given, given, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "linear last") == ["61.00", "62.00"]


def test_a_run_given_twice_counts_once(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "runs" / "a")
    (tmp_path / "link").symlink_to(run)
    rows, _, _ = compare(run, tmp_path / "runs", tmp_path / "link", out=tmp_path / "r.html",
                         capsys=capsys)  # fmt: skip
    assert column(rows, "seeds") == ["0"]


def test_evaluations_of_earlier_epochs_are_not_mixed_in(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "a")
    make_probe(run, 60.0, knn=50.0)
    make_probe(run, 20.0, knn=10.0, epoch=2, name="early")
    make_measure(run, 0.9, -1.0, epoch=2)
    make_measure(run, 0.5, -3.0)
    rows, _, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "linear last") == ["60.00"] and column(rows, "k-NN top-1") == ["50.00"]
    assert column(rows, "alignment") == ["0.500"]
    (read,), _ = read_runs([tmp_path])
    assert read.encoders() == [(2, 0.9, -1.0), (5, 0.5, -3.0)]
    assert (read.linear("last", 2), read.knn(2)) == (20.0, 10.0)


def test_measures_of_other_layers_and_exponents_are_not_mixed_in(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "a")
    make_measure(run, 0.9, -1.0, alpha=1.0, t=3.0)
    rows, _, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "alignment") == ["–"] and column(rows, "uniformity") == ["–"]
    make_measure(run, 0.9, -1.0, layer="backbone")
    rows, _, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "alignment") == ["–"]


def test_measures_of_both_layers_are_read_for_the_projection(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    by_layer = {
        name: {"alignment": {"1": 0.1, "2": a}, "uniformity": {"2": u, "3": -9.0}}
        for name, a, u in (("backbone", 0.3, -1.0), ("projection", 0.6, -2.0))
    }
    make_measure(run, 0.3, -1.0, layer="backbone", layers=by_layer)
    ((read,), left_out) = read_runs([run])
    assert (read.measured("alignment"), read.measured("uniformity")) == (0.6, -2.0)
    for layers in ({}, {"projection": 3}, {"projection": {"alignment": [], "uniformity": None}}):
        make_measure(run, 0.3, -1.0, layers=layers)
        ((read,), left_out) = read_runs([run])
        assert read.measured("alignment") is None and not left_out


def test_short_names(tmp_path) -> None:
    for name in ("x/pretrain", "y/pretrain"):
        make_run(tmp_path / name)
    runs, _ = read_runs([tmp_path])
    assert short_names(runs) == ["x", "y"] and short_names(runs[:1]) == ["pretrain"]


def test_time_of_a_run_that_went_on_from_another(tmp_path) -> None:
    """Its log begins at step 12: 5 intervals of 1 s are its own."""
    run = make_run(tmp_path / "a")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[10:]))
    ((read,), _) = read_runs([run])
    assert read.hours() == pytest.approx(5 / 3600) and read.images_per_s() == pytest.approx(16)


def test_an_untrained_encoder_is_a_run_without_lines(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "a", steps=0, max_steps=0)
    make_probe(run, 12.0, epoch=0)
    rows, _, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "objective") == ["untrained"] and column(rows, "linear last") == ["12.00"]
    assert column(rows, "hours") == ["–"]


# ---- What is left out -----------------------------------------------------------------------


def spoil_args(**changes):
    def spoil(run: Path) -> None:
        args = json.loads((run / "args.json").read_text())
        args.update(changes)
        (run / "args.json").write_text(json.dumps({k: v for k, v in args.items() if v != "drop"}))

    return spoil


def spoil_file(name: str, content: bytes | None):
    def spoil(run: Path) -> None:
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_bytes(content)

    return spoil


def cut_log(run: Path) -> None:
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:-4]) + lines[-4][:20])


def checkpoint_of(content: object):
    def spoil(run: Path) -> None:
        torch.save(content, run / "checkpoint_0004.pth.tar")

    return spoil


SPOILED = {
    "unfinished": (cut_log, "is unfinished: step 16 of 20"),
    "no log": (spoil_file("log.jsonl", None), "has no log.jsonl"),
    "empty log": (spoil_file("log.jsonl", b""), "is unfinished: step 0 of 20"),
    "binary log": (spoil_file("log.jsonl", b"\xff\xfe\x00"), "log.jsonl cannot be read"),
    "log of other lines": (spoil_file("log.jsonl", b"[1]\n[2]\n"), "another version"),
    "text in the log": (spoil_file("log.jsonl", b"hello\n{}\n"), "log.jsonl, line 1 is not JSON"),
    "no args": (spoil_file("args.json", None), "has no args.json"),
    "args cut off": (spoil_file("args.json", b'{"seed": '), "args.json cannot be read"),
    "deep args": (spoil_file("args.json", b"[" * 100_000), "args.json cannot be read"),
    "args a list": (spoil_file("args.json", b"[]"), "args.json holds a list"),
    "older args": (spoil_args(objective="drop"), "another version"),
    "huge step": (
        spoil_file("log.jsonl", b'{"kind": "train", "step": 1%s}\n' % (b"0" * 400)),
        "another version",
    ),
    "seed as text": (spoil_args(seed="0"), "no usable 'seed'"),
    "no batch": (spoil_args(batch_size=0), "below zero"),
    "newer checkpoint": (checkpoint_of({"version": 99}), "format version 99, expected 1"),
    "foreign checkpoint": (checkpoint_of([1]), "format version None"),
    "pickle": (spoil_file("checkpoint_0004.pth.tar", b"\x80\x04cos\nsystem\n."), "cannot be read"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_run_that_cannot_be_used_is_listed_with_the_reason(name, tmp_path, capsys) -> None:
    spoil, reason = SPOILED[name]
    make_run(tmp_path / "good")
    spoil(make_run(tmp_path / "bad", seed=1))
    runs, ((path, said),) = read_runs([tmp_path])
    assert [run.seed for run in runs] == [0]
    assert path == str(tmp_path / "bad") and reason in said
    shutil.rmtree(tmp_path / "good")
    status, line = refusal(compare_runs.main, [tmp_path, "--out", tmp_path / "r.html"], capsys)
    assert status == 2 and "no finished run to compare" in line and reason in line


def test_what_is_left_out_is_on_the_screen_and_the_page(tmp_path, capsys) -> None:
    make_run(tmp_path / "good")
    cut_log(make_run(tmp_path / "bad", seed=1))
    rows, screen, page = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "seeds") == ["0"]
    for text in (screen.split("## Left out")[1].split("##")[0], page):
        assert str(tmp_path / "bad") in text and "is unfinished: step 16 of 20" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no lincls.json"),
        (b"{}", "names no checkpoint"),
        (b"nonsense", "lincls.json cannot be read"),
        (b'{"checkpoint": "/else/checkpoint_0004.pth.tar", "arch": "a", "knn": {}}', "in none of"),
        (b'{"checkpoint": "/else/m.tar", "arch": "a", "top1": 3}', "evaluates a saved classifier"),
        (b'{"checkpoint": "a\\u0000b", "arch": "a", "knn": {}}', "names no checkpoint"),
        (b'{"checkpoint": "x", "arch": "a", "evaluation": "finetune", "last": {}}', "fine-tuning"),
        (
            b'{"checkpoint": "x", "arch": "a", "labels": {"of": 1}, "last": {}}',
            "part of the labels",
        ),
    ],
)
def test_a_probe_that_cannot_be_used_is_listed(content, reason, tmp_path, capsys) -> None:
    probe = make_probe(make_run(tmp_path / "good"), 50.0)
    (probe / "lincls.json").unlink()
    if content is not None:
        (probe / "lincls.json").write_bytes(content)
    (run,), ((path, said),) = read_runs([tmp_path])
    assert path == str(probe) and reason in said and run.linear("last") is None


def test_values_that_are_no_numbers_are_missing(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "a")
    make_probe(run, float("nan"), knn=float("inf"), best=[1], epoch=5)
    make_measure(run, "0.5", None)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "step": 20, "loss": NaN, "lr": true, "images_per_s": "x"}\n')
        log.write('{"kind": "train", "step": 20, "loss": 1%s}\n' % ("0" * 400))
    rows, _, _ = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    for name in ("k-NN top-1", "linear last", "linear best", "alignment", "uniformity"):
        assert column(rows, name) == ["–"], name


def test_paths_that_are_no_run_folders(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    wrong = [tmp_path / "missing", tmp_path / "empty", tmp_path / "file"]
    status, line = refusal(compare_runs.main, wrong, capsys)
    assert status == 2
    for reason in ("no such folder", "there is no run in it", "is a file, expected a run folder"):
        assert reason in line
    make_run(tmp_path / "good")
    _, screen, _ = compare(*wrong, tmp_path / "good", out=tmp_path / "r.html", capsys=capsys)
    assert "no such folder" in screen.split("## Left out")[1]


def test_report_that_cannot_be_written(tmp_path, capsys) -> None:
    make_run(tmp_path / "a")
    status, line = refusal(compare_runs.main, [tmp_path, "--out", tmp_path / "r.txt"], capsys)
    assert status == 2 and ".html" in line
    out = tmp_path / "none" / "r.html"
    status, line = refusal(compare_runs.main, [tmp_path / "a", "--out", out], capsys)
    assert status == 1 and "none" in line


# ---- The page -------------------------------------------------------------------------------


def test_page_is_self_contained_and_harmless(two_objectives, tmp_path, capsys) -> None:
    nasty = "<script>alert(1)</script> & $\\frac | `x`"
    run = make_run(tmp_path / "<b>bad & $x_</b>", nasty, arch="<img src=x>")
    make_measure(run, 0.2, -1.0)
    make_run(tmp_path / "cut" / "<i>", images=8000)
    _, screen, text = compare(tmp_path, out=tmp_path / "r.html", capsys=capsys)
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b", "i", "object"} & set(page.tags)
    assert {"svg", "table", "style"} <= set(page.tags)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.loaded)
    addresses = re.findall(r"\w+://[\w.]+", re.sub(r"base64,[^\"]*", "", text))
    assert set(addresses) <= {"http://www.w3.org"}, "names of XML, not loaded"
    assert "url(http" not in text and "@import" not in text
    assert nasty in "".join(page.text), "shown as it is"
    for line in screen.splitlines():
        assert "<script" not in line
        if line.startswith("|"):
            header = line
        assert not line.startswith("|") or line.endswith("|"), header


def test_the_same_runs_make_the_same_page(two_objectives, tmp_path, capsys) -> None:
    pages = [compare(two_objectives, out=tmp_path / f"{i}.html", capsys=capsys)[2] for i in "ab"]
    assert pages[0] == pages[1]


def test_numbers_are_told_from_text_that_begins_with_one() -> None:
    for text in ("43.65 ± 0.31", "-3.47", "+0.5 ± 0.1", "0.25", "1.82e-12", "–", "16 (of 2)"):
        assert compare_runs._is_number(text), text
    for text in (NCE, ALIGN, "0, 1, 2", "1 − 2", "", "ResNet-50", "67.5 as cited"):
        assert not compare_runs._is_number(text), text


def test_long_logs_make_short_curves() -> None:
    thinned = compare_runs.thinned([float(i) for i in range(100_000)])
    assert 200 < len(thinned) <= 400
    assert thinned[0] == statistics.fmean(range(250)) and thinned == sorted(thinned)
    assert compare_runs.thinned([3.0, 1.0]) == [3.0, 1.0]


def test_published_figures_have_sources() -> None:
    rows = compare_runs.published_rows()
    assert len(rows) > 20
    for row in rows[1:]:
        cells = dict(zip(rows[0], row, strict=True))
        assert cells["cited from"] and "–" != cells["objective"]
        accuracies = [cells["linear top-1"], cells["k-NN top-1"]]
        assert any(re.match(r"\d+\.\d", value) for value in accuracies), row
    assert any(row[6] == "67.69" and row[0] == "ImageNet" for row in rows)


@pytest.mark.long
def test_real_runs(tmp_path, capsys) -> None:
    data = write_labelled(tmp_path / "data", train=16, val=6)
    flags = (
        "-a resnet8 --image-size 16 --batch-size 16 --moco-k 32 --moco-dim 16 --epochs 2 -p 1 -j 0"
    ).split()
    started = []
    for name, objective in (("au", "--moco-align-w=3"), ("nce", "--moco-t=0.2")):
        for seed in (0, 1):
            folder = tmp_path / "runs" / f"{name}{seed}"
            words = [*flags, objective, "--seed", seed, "--save-dir", folder, data]
            started.append(Processes(tmp_path / f"{name}{seed}.out", *words))
    for run in started:
        assert run.wait() == [0], run.output()
    code = (
        "import runpy, sys, pathlib; sys.argv[0] = str(pathlib.Path(sys.argv[0]).with_name({!r}));"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for folder in sorted((tmp_path / "runs").iterdir()):
        last = folder / "checkpoint_0001.pth.tar"
        probe = ["--pretrained", last, "--epochs", 1, "--batch-size", 16, "--lr", 1, "--knn",
                 "--knn-k", 5, "--seed", 0, "-j", 0, "--save-dir", folder / "lincls",
                 data]  # fmt: skip
        run = Processes(tmp_path / "probe.out", *probe, code=code.format("main_lincls.py"))
        assert run.wait() == [0], run.output()
    rows, screen, _ = compare(tmp_path / "runs", out=tmp_path / "r.html", capsys=capsys)
    assert column(rows, "seeds") == ["0, 1", "0, 1"] and "Left out" not in screen
    for name in ("k-NN top-1", "linear last", "linear best", "hours", "images/s"):
        assert all("±" in cell for cell in column(rows, name)), name
    assert column(rows, "differs from row 1 in") == ["", ""]
    assert "| 1 − 2 | linear last | 0, 1 |" in screen
