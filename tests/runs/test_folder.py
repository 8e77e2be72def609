"""Run folders: which evaluation belongs to which run, what is left out and why."""

from __future__ import annotations

import json
import os

import pytest
import torch
from run_folders import NCE, column, compare, cut_log, make_measure, make_probe, make_run

from moco import checkpoint, run_files
from moco.runs.folder import read_runs, short_names


def test_probes_find_their_run_after_a_move(two_objectives, tmp_path) -> None:
    moved = two_objectives.rename(tmp_path / "elsewhere")
    rows, screen = compare(moved)
    assert column(rows, "linear last")[0].startswith("53.00")
    assert column(rows, "alignment")[0].startswith("0.530")
    assert "Left out" not in screen


def test_probe_within_its_run_folder_and_single_folders_given(tmp_path) -> None:
    run = make_run(tmp_path / "a", save_dir="/gone/a")
    probe = make_probe(run, 61.0, checkpoint="/lost/checkpoint_0004.pth.tar")
    probe.rename(run / "lincls")
    other = make_run(tmp_path / "b", NCE)
    given = make_probe(other, 62.0)
    rows, _ = compare(run, other, given, given)
    assert column(rows, "linear last") == ["61.00", "62.00"]


def test_a_run_given_twice_counts_once(tmp_path) -> None:
    run = make_run(tmp_path / "runs" / "a")
    (tmp_path / "link").symlink_to(run)
    rows, _ = compare(run, tmp_path / "runs", tmp_path / "link")
    assert column(rows, "seeds") == ["0"]


def test_evaluations_of_earlier_epochs_are_not_mixed_in(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    make_probe(run, 60.0, knn=50.0)
    make_probe(run, 20.0, knn=10.0, epoch=2, name="early")
    make_measure(run, 0.9, -1.0, epoch=2)
    make_measure(run, 0.5, -3.0)
    rows, _ = compare(tmp_path)
    assert column(rows, "linear last") == ["60.00"] and column(rows, "k-NN top-1") == ["50.00"]
    assert column(rows, "alignment") == ["0.500"]
    (read,), _ = read_runs([tmp_path])
    assert read.encoders() == [(2, 0.9, -1.0), (5, 0.5, -3.0)]
    assert (read.value("linear last", 2), read.value("k-NN top-1", 2)) == (20.0, 10.0)


def test_measures_of_other_layers_and_exponents_are_not_mixed_in(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    for other in ({"alpha": 1.0, "t": 3.0}, {"layer": "backbone"}):
        make_measure(run, 0.9, -1.0, **other)
        rows, _ = compare(tmp_path)
        assert column(rows, "alignment") == ["–"] and column(rows, "uniformity") == ["–"]


def test_measures_of_both_layers_are_read_for_the_projection(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    by_layer = {
        name: {"alignment": {"1": 0.1, "2": a}, "uniformity": {"2": u, "3": -9.0}}
        for name, a, u in (("backbone", 0.3, -1.0), ("projection", 0.6, -2.0))
    }
    make_measure(run, 0.3, -1.0, layer="backbone", layers=by_layer)
    ((read,), left_out) = read_runs([run])
    assert read.place_of() == (0.6, -2.0)
    for layers in ({}, {"projection": 3}, {"projection": {"alignment": [], "uniformity": None}}):
        make_measure(run, 0.3, -1.0, layers=layers)
        ((read,), left_out) = read_runs([run])
        assert read.value("alignment") is None and not left_out


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


def test_an_untrained_encoder_is_a_run_without_lines(tmp_path) -> None:
    run = make_run(tmp_path / "a", steps=0, max_steps=0)
    make_probe(run, 12.0, epoch=0)
    rows, _ = compare(tmp_path)
    assert column(rows, "objective") == ["untrained"] and column(rows, "linear last") == ["12.00"]
    assert column(rows, "hours") == ["–"]


ARGS, LOG, CHECKPOINT = "args.json", "log.jsonl", "checkpoint_0004.pth.tar"
SPOILED = {  # a file, and its content: bytes, None for no such file, what torch saves, or arguments
    "unfinished": (LOG, cut_log, "is unfinished: step 16 of 20"),
    "no log": (LOG, None, "has no log.jsonl"),
    "empty log": (LOG, b"", "is unfinished: step 0 of 20"),
    "text in the log": (LOG, b"hello\n{}\n", "log.jsonl has 2 damaged line"),
    "huge step": (LOG, b'{"kind": "train", "step": 1%s}' % (b"0" * 400), "log.jsonl has 1 damaged"),
    "no args": (ARGS, None, "has no args.json"),
    "args cut off": (ARGS, b'{"seed": ', "args.json cannot be read"),
    "deep args": (ARGS, b"[" * 100_000, "args.json cannot be read"),
    "args a list": (ARGS, b"[]", "args.json holds a list"),
    "older args": (ARGS, {"objective": None}, "another version"),
    "seed as text": (ARGS, {"seed": "0"}, "no usable 'seed'"),
    "no batch": (ARGS, {"batch_size": 0}, "below zero"),
    "steps noted": (ARGS, {"steps_per_epoch": 5}, "is unfinished: step 20 of 25"),
    "less than one": (ARGS, {"steps_per_epoch": -1, "epochs": 25}, "is unfinished: step 20 of 25"),
    "newer checkpoint": (CHECKPOINT, {"version": 99}, "format version 99, expected 1"),
    "foreign checkpoint": (CHECKPOINT, {"weights": 1}, "format version None, expected 1"),
    "a list": (CHECKPOINT, [1], "it holds a list instead of a dict"),
    "pickle": (CHECKPOINT, b"\x80\x04cos\nsystem\n.", "cannot be read"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_run_that_cannot_be_used_is_listed_with_the_reason(name, tmp_path) -> None:
    file, content, reason = SPOILED[name]
    make_run(tmp_path / "good")
    bad = make_run(tmp_path / "bad", seed=1)
    if content is cut_log:
        cut_log(bad)
    elif content is None:
        (bad / file).unlink()
    elif isinstance(content, bytes):
        (bad / file).write_bytes(content)
    elif file == CHECKPOINT:
        torch.save(content, bad / file)
    else:
        (bad / file).write_text(json.dumps(json.loads((bad / file).read_text()) | content))
    runs, ((path, said),) = read_runs([tmp_path])
    assert [run.seed for run in runs] == [0]
    assert path == str(bad) and reason in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no lincls.json"),
        (b"{}", "names no checkpoint"),
        (b"nonsense", "lincls.json cannot be read"),
        (b'{"checkpoint": "/else/checkpoint_0004.pth.tar", "arch": "a", "knn": {}}', "in none of"),
        (b'{"checkpoint": "/else/m.tar", "arch": "a", "top1": 3}', "evaluates a saved classifier"),
        (b'{"checkpoint": "a\\u0000b", "arch": "a", "knn": {}}', "names no checkpoint"),
    ],
)
def test_a_probe_that_cannot_be_used_is_listed(content, reason, tmp_path) -> None:
    probe = make_probe(make_run(tmp_path / "good"), 50.0)
    (probe / "lincls.json").unlink()
    if content is not None:
        (probe / "lincls.json").write_bytes(content)
    (run,), ((path, said),) = read_runs([tmp_path])
    assert path == str(probe) and reason in said and run.value("linear last") is None


def test_values_that_are_no_numbers_are_missing(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    make_probe(run, float("nan"), knn=float("inf"), best=[1], epoch=5)
    make_measure(run, "0.5", None)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "step": 20, "loss": NaN, "lr": true, "images_per_s": "x"}\n')
        log.write('{"kind": "train", "step": 20, "loss": 1%s}\n' % ("0" * 400))
    rows, _ = compare(tmp_path)
    for name in ("k-NN top-1", "linear last", "linear best", "alignment", "uniformity"):
        assert column(rows, name) == ["–"], name


def test_paths_that_are_no_run_folders(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    reasons = [
        (str(tmp_path / "missing"), "is no folder"),
        (str(tmp_path / "empty"), "holds no run"),
        (str(tmp_path / "file"), "is a file, expected a run folder"),
    ]
    assert read_runs([path for path, _ in reasons]) == ([], reasons)


def test_a_checkpoint_of_this_version_is_accepted_without_its_tensors(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    content = {"version": run_files.FORMAT_VERSION, "args": {"version": 99}, "w": torch.ones(9)}
    checkpoint.write_checkpoint(run / "checkpoint_0004.pth.tar", content)
    ((read,), left_out) = read_runs([run])
    assert read.seed == 0 and not left_out


VALUES = {
    "deep": "[" * 900 + "]" * 900,
    "NaN": "NaN",
    "large": "1e308",
    "huge": "1" + "0" * 4000,
    "hostile text": r'"<b>\ud800 \u001b[31m\n|\u0000"',
    "list": "[1, [2]]",
    "null": "null",
}
PLACES = [  # file, where in it: of a run, its evaluation and its measurement
    *(("a/args.json", name) for name in ("objective", "seed", "epochs", "batch_size", "images",
                                         "processes", "lr", "max_steps", "schedule", "save_dir",
                                         "print_freq", "provenance", "init_from")),
    *(("a-lincls/lincls.json", name) for name in ("checkpoint", "arch", "pretrained_epochs", "best",
                                                  "protocol", "evaluation", "labels", "heads",
                                                  "folds", "protocol.amp", "protocol.lr", "knn.k",
                                                  "protocol.cached_views", "last.top1",
                                                  "labels.of", "folds.count", "folds.settings")),
    *(("a-lincls/args.json", name) for name in ("pretrained", "amp", "device")),
    *(("a/measured_5.json", name) for name in ("checkpoint", "alignment", "images", "data",
                                               "layers", "alpha")),
]  # fmt: skip
FULL = {"labels": {"of": 1.0}, "folds": {"count": 3, "settings": [{"mean": 1.0}]}}


@pytest.mark.parametrize("value", VALUES)
def test_no_value_in_a_file_raises(value, tmp_path) -> None:
    """A run is compared or left out with a reason, and the report is text that can be written."""
    for i, (file, place) in enumerate(PLACES):
        root = tmp_path / str(i)
        make_measure(make_run(root / "a"), 0.5, -1.0)
        make_probe(root / "a", 50.0, knn=40.0, **FULL)
        make_run(root / "good", NCE)
        content = json.loads((root / file).read_text())
        *outer, name = place.split(".")
        (content[outer[0]] if outer else content)[name] = "@"
        (root / file).write_text(json.dumps(content).replace('"@"', VALUES[value]))
        _, text = compare(root)
        assert NCE in text, (file, place)
        text.encode("utf-8")
        assert "\x1b" not in text and "<b>" not in text, (file, place)


@pytest.mark.parametrize("value", VALUES)
def test_no_value_in_a_log_raises(value, tmp_path) -> None:
    for i, name in enumerate(("kind", "step", "loss", "images_per_s", "top1", "k", "uniformity")):
        for kind in ("train", "knn"):
            run = make_run(tmp_path / f"{i}-{kind}", seed=i)
            line = json.dumps({"kind": kind, "step": 20, name: "@"}).replace('"@"', VALUES[value])
            with open(run / "log.jsonl", "a") as log:
                log.write(f"{line}\n{line}\n")
    rows, _ = compare(tmp_path)
    assert column(rows, "seeds") == ["0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6"]


def test_damage_within_a_log_is_passed_over(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    bad = [b"[1]\n", b"null\n", b'{"step": null}\n', b"\xff\n", b"\0" * 99 + b"\n", b"[" * 10**5]
    (run / "log.jsonl").write_bytes(b"".join([*lines[:4], *bad, b"\n", *lines[4:]]))
    ((read,), left_out) = read_runs([run])
    assert len(read.log) == len(lines) and read.hours() == pytest.approx(10 / 3600)
    assert left_out == [(str(run / "log.jsonl"), "has 6 damaged line(s); the others are used")]


def test_pipes_and_folders_in_place_of_files_are_no_files(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    for name in ("args.json", "log.jsonl", "measured.json"):
        bad = make_run(tmp_path / f"bad-{name}")
        (bad / name).unlink(missing_ok=True)
        os.mkfifo(bad / name)
    (run / "lincls.json").mkdir()
    runs, left_out = read_runs([tmp_path])
    assert len(runs) == 1 and {reason for _, reason in left_out} == {
        "has no args.json", "has no log.jsonl", "has no lincls.json",
    }  # fmt: skip
