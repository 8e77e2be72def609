"""Sentence encoders as a task: training, exact resumption, processes, facts, refusals, collapse."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import harness
import pytest
import torch
from helpers import load_script, read_log, refusal

from moco import checkpoint
from moco.cli import sentence_config
from moco.runs.compare import Comparison, encoder_places
from moco.runs.folder import read_runs
from moco.tasks.sentences import SentenceTask, TextBlocks
from moco.train.step import apply_gradients

main = load_script("train_sentences").main
CODE = "import scripts.train_sentences as s; s.main()"
FLAGS = (
    "--val-sentences 12 --vocab 20 --emb 6 --hidden 5 -b 8 --epochs 2 --lr 0.01 --seed 1 -p 1 "
    "--device cpu --evaluate-every 4 --resume auto"
).split()
STEPS = 6  # of an epoch


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """62 sentences of up to 7 words in three documents."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(62)]
    lines.insert(20, "")
    lines.insert(41, "")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """A run that nobody touched."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    main([*FLAGS, "--save-dir", str(run), str(text)])
    return run


def test_a_run_logs_its_terms_and_the_held_out_sentences(whole) -> None:
    lines = read_log(whole)
    assert [line["step"] for line in lines] == list(range(1, 2 * STEPS + 1))
    for line in lines:
        assert line["loss"] == line["loss_contr"] and line["sentences_per_s"] > 0
        assert 0 < line["loss_align"] < 4 and -8 <= line["loss_unif"] <= 0
    held_out = read_log(whole, "held_out")
    # Every 4 steps, and at the ends of epochs.
    assert [line["step"] for line in held_out] == [4, 6, 8, 12]
    for line in held_out:
        mean = (line["uniformity_f"] + line["uniformity_g"]) / 2
        assert line["uniformity"] == pytest.approx(mean)
    assert held_out[-1]["alignment"] != held_out[0]["alignment"]
    content = checkpoint.read_checkpoint(whole / "checkpoint_0001.pth.tar")
    assert content["vocabulary"][0] == "<unk>" and len(content["vocabulary"]) == 11
    assert content["args"]["task"] == "sentences"


@pytest.mark.parametrize("step", [3, 7])
def test_a_run_goes_on_bit_for_bit_within_an_epoch(whole, text, tmp_path, step) -> None:
    run = tmp_path / "run"
    command = [*FLAGS, "--save-dir", str(run), str(text)]
    main([*command, "--max-steps", str(step)])
    main(command)
    before, after = harness.final_state(whole), harness.final_state(run)
    found = [  # at its end the first part was evaluated, and the log says so
        line for line in after["log"] if line["kind"] != "held_out" or line["step"] != step
    ]

    def without_rates(lines: list[dict]) -> list[dict]:
        return [{k: v for k, v in line.items() if k != "sentences_per_s"} for line in lines]

    assert harness.differences(before["checkpoint"], after["checkpoint"]) == []
    assert without_rates(found) == without_rates(before["log"])


@pytest.mark.long
def test_two_processes_train_the_objective_of_the_whole_block(whole, text, tmp_path) -> None:
    run = tmp_path / "run"
    words = [*FLAGS, "--save-dir", run, text]
    processes = harness.Processes(tmp_path / "out", *words, count=2, code=CODE)
    assert processes.wait() == [0, 0], processes.output()
    one, two = harness.final_state(whole), harness.final_state(run)
    for name, tensor in one["checkpoint"]["state_dict"].items():
        other = two["checkpoint"]["state_dict"][name]
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-5, msg=name)
    for a, b in zip(one["log"], two["log"], strict=True):
        for name in {"loss", "loss_align", "loss_unif", "grad_norm", "alignment"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-3), (name, a)


def test_the_start_says_what_is_trained_on_what(text, tmp_path, capsys) -> None:
    flags = "--max-steps 0 --contr-w 0 --align-w 0.9 --unif-w 0.1 --across-documents".split()
    main([*FLAGS, *flags, "--save-dir", str(tmp_path / "run"), str(text)])
    out = capsys.readouterr().out
    for fact in (
        "objective: 0.9 * align(alpha=2) + 0.1 * uniform(t=2, summed over f and g)",
        "50 sentences in 3 document(s), positives across them; 12 held out; 6 steps per epoch",
        "vocabulary of 11, lower case",
        "8 consecutive sentences over 1 process(es)",
        "f and g, bi-GRU, 10 features each",
        "Adam, lr 0.01, gradients of norm up to 0.5",
        "warning: collapse: features can end in one point, as align_w 0.9 is above 2 * t * unif_w "
        "= 0.4",
        "held out after step 0: alignment",
    ):
        assert fact in out, fact


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("--contr-w 0 --align-w 0.9 --unif-w 0.1 --unif-t 5", False),
        ("--contr-w 0 --align-w 1 --unif-w 0.1 --unif-t 4.9", True),
        ("--contr-w 0 --align-w 1", True),
        ("--contr-w 0 --align-w 0.1 --align-alpha 1 --unif-w 1", True),
        ("--contr-w 0 --align-w 9 --align-alpha 3 --unif-w 0.1", False),
        ("--align-w 1", False),
        ("--contr-w 0 --unif-w 1", False),
    ],
)
def test_who_is_warned_of_collapse(text, tmp_path, flags, warned) -> None:
    from moco.tasks.sentences import collapse_warning

    argv = [*FLAGS, *flags.split(), "--save-dir", str(tmp_path), str(text)]
    assert bool(collapse_warning(sentence_config(argv).objective)) == warned


def test_longer_gradients_are_shortened_and_logged_as_they_were(text, tmp_path) -> None:
    task = SentenceTask(sentence_config([*FLAGS, "--save-dir", str(tmp_path), str(text)]))
    task.build_data(torch.device("cpu"))
    module = task.build_module()

    class State:
        optimizer = torch.optim.SGD(module.parameters(), 1.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)

    State.module = module
    guard = type("Guard", (), {"leave_out": lambda self, norm: torch.zeros(())})()
    before = [p.detach().clone() for p in module.parameters()]
    for longest, moved in ((0.5, 0.5), (1e9, 3.0)):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])
        for parameter in module.parameters():
            parameter.grad *= 3.0 / norm
        assert apply_gradients(State, guard, longest).item() == pytest.approx(3.0, rel=1e-5)
        step = [p.detach() - b for p, b in zip(module.parameters(), before, strict=True)]
        assert torch.nn.utils.get_total_norm(step).item() == pytest.approx(moved, rel=1e-4)
        before = [p.detach().clone() for p in module.parameters()]


def test_blocks_are_the_text_in_order(text, tmp_path) -> None:
    config = sentence_config([*FLAGS, "--save-dir", str(tmp_path), str(text)])
    data = TextBlocks(config, torch.device("cpu"))
    blocks = list(data)
    assert len(blocks) == STEPS == data.steps_per_epoch
    lengths = torch.cat([lengths for _, lengths, _ in blocks])
    _, expected = data.text.train.padded()
    assert torch.equal(lengths, expected[:48])
    borders = torch.cat([documents for *_, documents in blocks]).diff().nonzero().flatten()
    assert borders.tolist() == [7, 27]  # after sentences 20 and 40 of 62, 12 held out
    across = sentence_config([*FLAGS, "--across-documents", "--save-dir", str(tmp_path), str(text)])
    for *_, documents in TextBlocks(across, torch.device("cpu")):
        assert not documents.any()
    data.set_epoch(1, 4)
    for (words, *_), (again, *_) in zip(blocks[4:], data, strict=True):
        assert torch.equal(words, again)


def test_what_would_learn_something_else_is_refused(whole, text, tmp_path, capsys) -> None:
    going_on = [*FLAGS, "--save-dir", whole]
    status, line = refusal(main, [*going_on, "--contr-tau", "0.1", text], capsys)
    assert status == 1 and "tau=0.075" in line and "tau=0.1" in line
    status, line = refusal(main, [*going_on, "--align-w", "1", text], capsys)
    assert status == 1 and "objective: " in line
    status, line = refusal(main, [*going_on, "--clip", "1", text], capsys)
    assert status == 1 and "clip: 0.5 before, 1.0 now" in line
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("a", "b"))
    status, line = refusal(main, [*going_on, other], capsys)
    assert status == 1 and "text_digest" in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--contr-w 0", "all loss weights are zero"),
        ("--no-normalize --align-w 1", "--no-normalize has the contrastive loss only"),
        ("--contr-tau 0", "--contr-tau must be positive"),
        ("--align-alpha 0.5", "--align-alpha must be at least 1"),
        ("--vocab 1", "--vocab must be at least 2"),
        ("--val-sentences 1", "--val-sentences must be 0 or at least 2"),
        ("--accumulate 2", "--accumulate 2 splits the batch, and losses within the batch need all"),
        ("-b 1", "--batch-size must be at least 2"),
        ("--encoding utf-16", "--encoding utf-16: its lines do not end in one byte"),
        ("--encoding klingon", "no such encoding: 'klingon'"),
        ("--encoding hex", "no such encoding: 'hex'"),
        ("--encoding undefined", "no such encoding: 'undefined'"),
    ],
)
def test_flags_that_cannot_be_are_refused_at_once(text, capsys, flags, message) -> None:
    status, line = refusal(main, [*flags.split(), text], capsys)
    assert status == 2 and message in line


def test_a_text_that_is_none_is_refused(text, tmp_path, capsys) -> None:
    assert "no such text" in refusal(main, [tmp_path / "none.txt"], capsys)[1]
    assert "is a folder, expected a text file" in refusal(main, [tmp_path], capsys)[1]
    run = tmp_path / "run"
    status, line = refusal(main, ["--device", "cpu", "--save-dir", run, text], capsys)
    assert status == 1 and "lower --val-sentences or --batch-size" in line and not run.exists()


def test_a_text_without_neighbours_is_refused(text, tmp_path, capsys) -> None:
    """Double-spaced, each sentence is a document of its own, and all losses would be 0."""
    spaced = tmp_path / "spaced.txt"
    spaced.write_text("\n\n".join(text.read_text().split("\n")))
    words = "--device cpu --val-sentences 0 --batch-size 4 --emb 4 --hidden 4 --epochs 1 --seed 1"
    status, line = refusal(main, [*words.split(), spaced], capsys)
    assert status == 1 and "no two sentences in a row" in line and "--across-documents" in line


def test_held_out_sentences_without_neighbours_are_refused(whole, text, tmp_path, capsys) -> None:
    """They would be measured as perfectly aligned."""
    half = tmp_path / "half.txt"
    lines = text.read_text().split("\n")
    half.write_text("\n\n".join(lines[:13]) + "\n" + "\n".join(lines[13:]))
    status, line = refusal(main, [*FLAGS, "--save-dir", tmp_path / "run", half], capsys)
    assert status == 1 and "12 held-out sentences, has no two sentences in a row" in line
    measure = load_script("measure_align_uniform").main
    status, line = refusal(measure, [whole / "checkpoint_0001.pth.tar", half], capsys)
    assert status == 1 and "12 sentences, has no two sentences in a row" in line


def test_weights_that_no_training_leads_to_end_the_run(text, tmp_path, capsys) -> None:
    """Features of unit length keep the loss finite, and saturated states the gradients small."""
    words = [*FLAGS, "--lr", "1e30", "--save-dir", tmp_path, text]
    status, line = refusal(main, words, capsys)
    assert status == 1 and "after step 4 f.embedding.weight is up to 3e+30" in line
    assert "checkpoint is none yet. Lower --lr" in line and not list(tmp_path.glob("*.tar"))


def test_the_original_has_temperature_1() -> None:
    config = sentence_config(["--no-normalize", __file__])
    assert config.to_flat()["objective"] == "1 * contrastive(tau=1, raw features, diagonal 0)"


def test_measuring_a_checkpoint_finds_what_was_logged(whole, text, tmp_path, capsys) -> None:
    out = tmp_path / "measured.json"
    measure = load_script("measure_align_uniform").main
    file = whole / "checkpoint_0001.pth.tar"
    measure([str(file), str(text), "--device", "cpu", "--out", str(out)])
    said = capsys.readouterr().out
    assert "12 sentences of" in said and "alignment is of neighbours, f with g" in said
    found, logged = json.loads(out.read_text()), read_log(whole, "held_out")[-1]
    for name in ("alignment", "uniformity"):
        assert found[name] == pytest.approx(logged[name], rel=1e-5)
    for encoder in ("f", "g"):
        measured = found["layers"][encoder]["uniformity"]["2"]
        assert measured == pytest.approx(logged[f"uniformity_{encoder}"], rel=1e-5)
    status, line = refusal(measure, [file, text, "--layer", "projection"], capsys)
    assert status == 2 and "leave --timm and --layer out" in line
    status, line = refusal(measure, [file, text.parent], capsys)
    assert status == 1 and "holds sentence encoders" in line


def test_runs_are_compared_by_what_was_found_out_about_them(whole, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    found = {"accuracy": 75.0, "folds_mean": 70.0, "of": 11, "nested": {"accuracy": 71.0}}
    (tmp_path / "run" / "sentiment.json").write_text(
        json.dumps(
            {"checkpoint": str(whole / "checkpoint_0001.pth.tar"), "pretrained_epochs": 2,
             "sentiment": {"MR": found, "CR": "damaged"}}
        )
    )  # fmt: skip
    runs, left_out = read_runs([tmp_path])
    assert left_out == [] and len(runs) == 1
    values = {name: runs[0].value(name) for name in ("MR", "MR folds", "MR nested", "CR")}
    assert values == {"MR": 75.0, "MR folds": 70.0, "MR nested": 71.0, "CR": None}
    held_out = read_log(whole, "held_out")[-1]
    assert runs[0].value("alignment") == held_out["alignment"]
    assert runs[0].epochs == 2 and runs[0].images_per_s() > 0
    assert runs[0].recipe()["text_digest"] and "contr_tau" not in runs[0].recipe()
    columns = {column.title: column.values(runs[0]) for column in Comparison(runs).columns}
    assert columns["MR"] == [75.0]
    assert encoder_places(Comparison(runs))[0] == "MR (%)"


def test_adam_leaves_a_step_that_is_not_finite_out(text, tmp_path) -> None:
    """Also the first one, before it has any state."""
    task = SentenceTask(sentence_config([*FLAGS, "--save-dir", str(tmp_path), str(text)]))
    module = torch.nn.Linear(3, 2)
    optimizer = task.build_optimizer(module)

    def step(value: float) -> list[torch.Tensor]:
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, value)
        optimizer.found_inf = torch.tensor(float(value != value))
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values()]
        return [t.detach().clone() for t in (*module.parameters(), *states)]

    before = [p.detach().clone() for p in module.parameters()]
    first = step(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(before, first, strict=False))
    good = step(1.0)
    bad = step(math.nan)
    assert all(torch.equal(a, b) for a, b in zip(good, bad, strict=True))
    assert not torch.equal(before[0], good[0])
