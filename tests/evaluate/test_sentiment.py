"""Sentiment of reviews: the pinned split, the classifiers, the command, and what it is told."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, load_script, refusal

from moco import checkpoint
from moco.checkpoint import load_encoder, load_sentence_encoders
from moco.data.text import Vocabulary
from moco.errors import CheckpointError, DataError
from moco.evaluate import sentiment
from moco.evaluate.sentences import encode, neighbour_metrics
from moco.sentence_encoders import QuickThought

REAL = ROOT.parent / "shared" / "data" / "text"
WORDS = ["<unk>", *"good bad film the a was very not".split()]
main = load_script("evaluate_sentences").main


def write(folder: Path, name: str, positive: int, negative: int) -> Path:
    draw = random.Random(0)
    for file, count, word in zip(
        sentiment.FILES[name], (positive, negative), ("good", "bad"), strict=True
    ):
        lines = [
            " ".join([*draw.choices(WORDS[3:], k=3), draw.choice([word, word, "film"]), str(i)])
            for i in range(count)
        ]
        (folder / file).write_text("\n".join(lines) + "\n\n")
    return folder


def write_checkpoint(path: Path, **others: object) -> Path:
    torch.manual_seed(0)
    module = QuickThought(len(WORDS), 6, 4)
    checkpoint.write_checkpoint(
        path,
        {
            "version": 1, "arch": "bigru", "epoch": 1, "step": 7, "vocabulary": WORDS,
            "state_dict": {f"module.{n}": t for n, t in module.state_dict().items()},
            "args": {"task": "sentences", "objective": "1 * contrastive(tau=1)"},
            **others,
        },
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("encoder") / "checkpoint_0000.pth.tar")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("reviews"), "CR", 60, 45)


@pytest.mark.parametrize("name", ["MR", "CR"])
def test_the_validation_split_is_the_published_one(tmp_path, name) -> None:
    """Its size, and its share of positive ones, which is what a constant answer gets."""
    found = sentiment.read_reviews(name, write(tmp_path, name, *sentiment.COUNTS[name]))
    assert found.note is None
    published = {"MR": (1067, 49.77), "CR": (378, 63.49)}
    assert (found.val, round(sentiment.constant_accuracy(found), 2)) == published[name]
    order = np.arange(sum(sentiment.COUNTS[name]))
    np.random.RandomState(1234).shuffle(order)
    assert found.labels[:9].tolist() == [int(i < sentiment.COUNTS[name][0]) for i in order[:9]]


@pytest.mark.skipif(not REAL.is_dir(), reason="MR and CR are not here")
@pytest.mark.parametrize("name", ["MR", "CR"])
def test_the_real_files_are_the_standard_sets(name) -> None:
    found = sentiment.read_reviews(name, REAL)
    assert found.note is None and all(sentence.strip() for sentence in found.sentences)
    assert not any("\n" in sentence or "\ufffd" in sentence for sentence in found.sentences)


def test_both_solvers_find_the_optimum() -> None:
    pytest.importorskip("sklearn")
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 8))
    labels = (rows @ rng.normal(size=8) + rng.normal(size=300) > 0).astype(int)
    classifiers = sentiment.Classifiers()
    for c in (1.0, 256.0):
        dense, sparse = (
            classifiers.correct(x[100:], labels[100:], x[:100], labels[:100], c)
            for x in (rows, csr_matrix(rows))
        )
        assert abs(dense - sparse) <= 1 and dense > 75
    assert classifiers.fits == 4 and classifiers.stopped == 0


def test_strengths_are_chosen_without_the_validation_split(reviews) -> None:
    pytest.importorskip("sklearn")
    found = sentiment.read_reviews("CR", reviews)
    rows = sentiment.bag_of_words(found)
    first = sentiment.evaluate(found, rows, sentiment.Classifiers(), "")
    found.labels[: found.val] = 1 - found.labels[: found.val]
    turned = sentiment.evaluate(found, rows, sentiment.Classifiers(), "")
    assert (first["C"], first["folds_mean"]) == (turned["C"], turned["folds_mean"])
    assert first["correct"] + turned["correct"] == found.val == 11
    assert 60 < first["folds_mean"] <= 100 and first["C"] in sentiment.STRENGTHS


def test_classifiers_never_see_what_they_are_measured_on(reviews) -> None:
    """Labels that follow no rule but the fold's number: C and weights are of the others alone."""
    pytest.importorskip("sklearn")
    rows, labels = np.eye(40)[:, :8] + 0.01, np.arange(40) % 2
    seen = []

    class Chosen(sentiment.Classifiers):
        def choose(self, rows, labels, what):
            seen.append((len(rows), what))
            return 4.0, 0.0

        def correct(self, train, labels, test, truth, c):
            seen.append((len(train), len(test), c))
            return len(test) - 1

    found = sentiment.cross_validate(rows, labels, 5, Chosen(), "CR")
    assert found == {"accuracy": 100 * 7 / 8, "folds": 5}
    assert seen[:2] == [(32, "CR, fold 1"), (32, 8, 4.0)] and len(seen) == 10
    sentiment.evaluate(sentiment.read_reviews("CR", reviews), np.eye(105), Chosen(), "CR")
    assert seen[10:] == [(94, "CR"), (94, 11, 4.0)]
    assert [test.tolist() for _, test in sentiment.folds(labels[:5], 2)] == [[0, 1, 2], [3, 4]]


def test_the_command_prints_the_line_and_writes_json(
    file, reviews, tmp_path, capsys, monkeypatch
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sentiment, "STRENGTHS", (1.0, 4.0))
    out = tmp_path / "result.json"
    words = [file, "--cr", reviews, "--folds", "3", "--nested", "--device", "cpu", "--out", out]
    main([str(word) for word in words])
    *_, note, line = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    found = result["sentiment"]["CR"]
    assert line == (
        f"CR {found['accuracy']:.1f} % ({found['correct']} of 11), C {found['C']:g}; "
        f"3 folds of the rest {found['cross_validated']['accuracy']:.1f}; "
        f"nested {found['nested']['accuracy']:.1f}; constant {found['constant']:.1f}; "
        f"bag of words {found['bag_of_words']['accuracy']:.1f}"
    )
    first, last = result["notes"]
    assert first.startswith("CR is not the standard set: 60 positive and 45 negative")
    assert "nested" in last and note == f"note: {last}"
    assert result["checkpoint"] == str(file) and result["pretrained_epochs"] == 1
    assert found["unknown_words"] > 10


def test_features_are_a_sentences_own(file) -> None:
    """Whatever stands beside it in the batch, and of unit length by each encoder."""
    module, info = load_sentence_encoders(file)
    assert info["feature_dim"] == 8 and info["objective"] == "1 * contrastive(tau=1)"
    vocabulary = Vocabulary(info["vocabulary"], lower=info["lower"])
    sentences = ["good film", "the bad film was very very bad", "", "unknown words", "a good"]
    cpu = torch.device("cpu")
    u, v = encode(module, vocabulary.encode(sentences), cpu, batch=2)
    for i, sentence in enumerate(sentences):
        alone = encode(module, vocabulary.encode([sentence]), cpu)
        torch.testing.assert_close(alone, (u[i : i + 1], v[i : i + 1]))
    torch.testing.assert_close(u.norm(dim=1), torch.ones(5))
    found = neighbour_metrics(u, v, torch.tensor([0, 0, 0, 1, 1]))
    pairs = [(0, 1), (1, 2), (3, 4)]
    distances = [(u[i] - v[j]).square().sum() for a, b in pairs for i, j in ((a, b), (b, a))]
    shares = torch.tensor([1, 0.5, 0.5, 1, 1, 1]) / 5
    assert found["alignment"] == pytest.approx((torch.stack(distances) @ shares).item(), rel=1e-5)


def test_a_share_without_sentences_has_no_features(file) -> None:
    """As that of a rank, where ranks are more than held-out sentences."""
    module, info = load_sentence_encoders(file)
    sentences = Vocabulary(info["vocabulary"], lower=True).encode(["a b", "c"])
    cpu = torch.device("cpu")
    shares = [encode(module, sentences.part(*ends), cpu) for ends in ((0, 0), (0, 2))]
    for none, all_of_them in zip(*shares, strict=True):
        assert torch.cat([none, all_of_them]).equal(all_of_them)


def test_a_run_folder_stands_for_its_newest_checkpoint(file) -> None:
    assert load_sentence_encoders(file.parent)[1]["checkpoint"] == str(file)
    with pytest.raises(CheckpointError, match="without checkpoints"):
        load_sentence_encoders(file.parent.parent)


def test_encoders_of_images_and_of_sentences_are_not_taken_for_each_other(
    file, encoder_file
) -> None:
    with pytest.raises(CheckpointError, match="holds sentence encoders .*/evaluate_sentences"):
        load_encoder(file)
    with pytest.raises(CheckpointError, match="no checkpoint of scripts/train_sentences"):
        load_sentence_encoders(encoder_file)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"vocabulary": None}, "has no vocabulary"),
        ({"vocabulary": WORDS[1:]}, "does not fit a vocabulary of 8"),
        ({"state_dict": {"module.f.x": torch.ones(1)}}, "has no f.embedding.weight"),
    ],
)
def test_damaged_sentence_checkpoints_are_named(tmp_path, others, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_sentence_encoders(write_checkpoint(tmp_path / "c.pth.tar", **others))


def test_what_the_command_refuses(file, reviews, tmp_path, capsys, monkeypatch) -> None:
    for words, message in (
        ([file], "give --mr DIR, --cr DIR, or both"),
        ([file, "--cr", tmp_path / "none"], "no such folder"),
        ([tmp_path / "none", "--cr", reviews], "no such checkpoint"),
        ([file, "--cr", reviews, "--batch-size", 0], "--batch-size must be at least 1"),
        ([file, "--cr", reviews, "--out", tmp_path], "is a folder, expected a file to write"),
    ):
        status, line = refusal(main, words, capsys)
        assert status == 2 and message in line
    status, line = refusal(main, [file, "--mr", reviews], capsys)
    assert status == 1 and "no such file" in line and "rt-polarity.pos" in line
    for name in ("sklearn", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    status, line = refusal(main, [file, "--cr", reviews], capsys)
    assert status == 1 and "needs the package scikit-learn: pip install scikit-learn" in line
    with pytest.raises(DataError, match=r"custrev\.neg has 3 sentences, expected 20"):
        sentiment.read_reviews("CR", write(tmp_path, "CR", 30, 3))
