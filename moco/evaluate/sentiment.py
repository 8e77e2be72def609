"""Sentence features by sentiment: MR and CR, a pinned split, l2-regularised logistic regression.

The protocol of arXiv:2005.10242, Tables 4 and 11, by its printed figures: labels 1 for positive,
files in the order positive, negative, one shuffle by `RandomState(1234)` (that of the skip-thoughts
code); the first tenth is the validation split, the inverse strength C is chosen among 2^0 .. 2^8 by
ten folds, without another shuffle, of the other nine tenths. Table 11's cross-validation is of
these nine tenths too: its printed figures of CR are multiples of 1/3393.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moco.checkpoint import load_sentence_encoders
from moco.data.text import Vocabulary, tokenize
from moco.errors import DataError
from moco.evaluate.sentences import encode
from moco.packages import import_optional
from moco.progress import progress

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

STRENGTHS = tuple(float(2**i) for i in range(9))  # C, the inverse of the penalty's strength
FOLDS = 10
MOST_ITERATIONS = 1000
BAG_WORDS = 20_000

# name: (files of positive and of negative sentences, how many of each, of the validation split)
FILES = {"MR": ("rt-polarity.pos", "rt-polarity.neg"), "CR": ("custrev.pos", "custrev.neg")}
COUNTS = {"MR": (5331, 5331), "CR": (2405, 1366)}
VALIDATION = {"MR": (1067, 531), "CR": (378, 240)}  # sentences, positive ones


@dataclass(frozen=True)
class Reviews:
    """Sentences with labels, in the shuffled order.

    Attributes:
        labels: (N,) int64, 1 for positive.
        note: what is not as published; None for the standard set.
    """

    name: str
    sentences: list[str]
    labels: np.ndarray
    note: str | None

    @property
    def val(self) -> int:
        """Sentences of the validation split, the first ones."""
        return -(-len(self.sentences) // FOLDS)


def read_reviews(name: str, folder: str | os.PathLike) -> Reviews:
    """MR (rt-polarity.pos, .neg) or CR (custrev.pos, .neg): a sentence a line, blank ones left out.

    Raises:
        DataError: a file is missing, or has fewer than 20 sentences.
    """
    parts = [_sentences(Path(folder) / file) for file in FILES[name]]
    counts = tuple(map(len, parts))
    for file, count in zip(FILES[name], counts, strict=True):
        if count < 2 * FOLDS:
            raise DataError(f"{Path(folder) / file} has {count} sentences, expected {2 * FOLDS}")
    labels = np.repeat([1, 0], counts)
    order = np.arange(len(labels))
    np.random.RandomState(1234).shuffle(order)
    every = [*parts[0], *parts[1]]
    note = None
    if counts != COUNTS[name]:
        note = (
            f"{name} is not the standard set: {counts[0]} positive and {counts[1]} negative "
            f"sentences, expected {COUNTS[name][0]} and {COUNTS[name][1]}"
        )
    reviews = Reviews(name, [every[i] for i in order], labels[order], note)
    split = reviews.val, int(reviews.labels[: reviews.val].sum())
    if note is None and split != VALIDATION[name]:
        raise AssertionError(f"the split of {name} is {split}, expected {VALIDATION[name]}")
    return reviews


def _sentences(path: Path) -> list[str]:
    """Lines end in \\n alone: some hold the byte of NEL. Each is UTF-8 or else Latin-1."""
    try:
        lines = path.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"no such file: {path}") from None
    found = []
    for line in lines:
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = line.decode("latin-1")
        if text.strip():
            found.append(text.strip())
    return found


class Classifiers:
    """Logistic regressions with an l2 penalty, by scikit-learn; counts those that stopped before
    they converged.

    Dense rows by Newton's method, which is at the optimum in a few steps; a sparse matrix has too
    many columns for it, and goes to liblinear, which penalises the bias too, as the skip-thoughts
    code did. (lbfgs stops early on features of unit length when the penalty is weak.)
    """

    def __init__(self) -> None:
        purpose = "logistic regression"
        self.models = import_optional("sklearn.linear_model", purpose, "scikit-learn")
        self.fits = self.stopped = 0

    def correct(
        self, train: Any, labels: np.ndarray, test: Any, truth: np.ndarray, c: float
    ) -> int:
        """Train with inverse strength c; how many of the test rows are classified correctly."""
        solver = "newton-cholesky" if isinstance(train, np.ndarray) else "liblinear"
        model = self.models.LogisticRegression(
            C=c, solver=solver, max_iter=MOST_ITERATIONS, random_state=0
        )
        model.fit(train, labels)
        self.fits += 1
        self.stopped += int(max(model.n_iter_) >= MOST_ITERATIONS)
        return int((model.predict(test) == truth).sum())

    def choose(self, rows: Any, labels: np.ndarray, what: str) -> tuple[float, float]:
        """The first best of `STRENGTHS` by ten folds, and its accuracy (%) there."""
        accuracies = []
        for c in progress(STRENGTHS, what):
            correct = 0
            for train, test in folds(labels, FOLDS):
                if len(set(labels[train])) == 2:
                    correct += self.correct(rows[train], labels[train], rows[test], labels[test], c)
            accuracies.append(correct)
        best = int(np.argmax(accuracies))
        return STRENGTHS[best], 100 * accuracies[best] / len(labels)


def folds(labels: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(the others, the fold): positions, each fold a run of rows."""
    selection = import_optional("sklearn.model_selection", "folds", "scikit-learn")
    return selection.KFold(count).split(labels)


def evaluate(reviews: Reviews, rows: Any, classifiers: Classifiers, what: str) -> dict[str, Any]:
    """Accuracy (%) on the validation split, after the choice of C on the rest.

    Args:
        rows: (N, C) features in the order of the reviews, an array or a sparse matrix.
        what: for the progress bar.
    """
    val, labels = reviews.val, reviews.labels
    c, folds_mean = classifiers.choose(rows[val:], labels[val:], what)
    correct = classifiers.correct(rows[val:], labels[val:], rows[:val], labels[:val], c)
    return {
        "accuracy": 100 * correct / val,
        "correct": correct,
        "of": val,
        "C": c,
        "folds_mean": folds_mean,
    }


def cross_validate(
    rows: Any, labels: np.ndarray, count: int, classifiers: Classifiers, what: str
) -> dict[str, Any]:
    """Mean accuracy (%) over `count` folds, C chosen by ten folds of the others each time."""
    found = []
    for number, (train, test) in enumerate(folds(labels, count), start=1):
        c, _ = classifiers.choose(rows[train], labels[train], f"{what}, fold {number}")
        correct = classifiers.correct(rows[train], labels[train], rows[test], labels[test], c)
        found.append(100 * correct / len(test))
    return {"accuracy": float(np.mean(found)), "folds": count}


def constant_accuracy(reviews: Reviews) -> float:
    """Accuracy (%) on the validation split of whatever most of the others are."""
    answer = int(reviews.labels[reviews.val :].mean() >= 0.5)
    return 100 * float((reviews.labels[: reviews.val] == answer).mean())


def bag_of_words(reviews: Reviews, *, lower: bool = True) -> csr_matrix:
    """(N, W) which of the most frequent words, of the sentences outside of the validation split,
    each sentence has."""
    words = [tokenize(sentence, lower=lower) for sentence in reviews.sentences]
    counts = Counter(word for sentence in words[reviews.val :] for word in sentence)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(BAG_WORDS))}
    columns = [sorted({number[w] for w in sentence if w in number}) for sentence in words]
    ends = np.cumsum([0, *map(len, columns)])
    flat = np.array([i for row in columns for i in row], np.int32)
    sparse = import_optional("scipy.sparse", "a bag of words")
    return sparse.csr_matrix((np.ones(len(flat)), flat, ends), (len(words), len(number)))


def evaluate_checkpoint(
    path: str | os.PathLike,
    folders: Mapping[str, str | os.PathLike],
    device: torch.device,
    *,
    batch: int = 400,
    folds: int | None = None,
    nested: bool = False,
) -> dict[str, Any]:
    """Evaluate the sentence encoders of a file; features are those of f and of g, each of unit
    length, side by side.

    Args:
        path: as `load_sentence_encoders` takes it.
        folders: of "MR", of "CR", or of both.
        folds: also by so many folds of all but the validation split, as Table 11 with 5.
        nested: also by ten folds of all sentences, what tables as SentEval's print and not
            comparable with the paper's.

    Returns:
        What can be written as JSON: `checkpoint`, `objective`, `sentiment` (by name the result of
        `evaluate`, `cross_validated`, `nested`, `constant`, `bag_of_words`, `unknown_words` in
        percent) and `notes`.

    Raises:
        DataError: files of sentences are missing, or scikit-learn is; fewer sentences than folds.
        CheckpointError, FileNotFoundError: see `load_sentence_encoders`.
    """
    classifiers = Classifiers()
    sets = [read_reviews(name, folder) for name, folder in folders.items()]
    for reviews in sets:
        if folds is not None and folds > len(reviews.sentences) - reviews.val:
            rest = len(reviews.sentences) - reviews.val
            raise DataError(f"{reviews.name} has {rest} sentences to make {folds} folds of")
    module, info = load_sentence_encoders(path)
    vocabulary = Vocabulary(info["vocabulary"], lower=info["lower"])
    module.to(device)
    notes, found = [reviews.note for reviews in sets if reviews.note], {}
    for reviews in sets:
        sentences = vocabulary.encode(reviews.sentences)
        features = torch.cat(encode(module, sentences, device, batch=batch), dim=1)
        rows, name = features.double().numpy(), reviews.name
        found[name] = {
            **evaluate(reviews, rows, classifiers, name),
            "constant": constant_accuracy(reviews),
            "bag_of_words": evaluate(
                reviews, bag_of_words(reviews), classifiers, f"{name}, bag of words"
            ),
            "unknown_words": 100 * sentences.unknown_share(),
        }
        val, labels = reviews.val, reviews.labels
        if folds is not None:
            found[name]["cross_validated"] = cross_validate(
                rows[val:], labels[val:], folds, classifiers, f"{name}, folds"
            )
        if nested:
            found[name]["nested"] = cross_validate(
                rows, labels, FOLDS, classifiers, f"{name}, nested"
            )
    if classifiers.stopped:
        notes.append(
            f"{classifiers.stopped} of {classifiers.fits} fits stopped at {MOST_ITERATIONS} "
            "iterations, before they converged"
        )
    if nested:
        notes.append("nested: mean of ten folds of all sentences, no figure of the paper's tables")
    about = {n: info[n] for n in ("checkpoint", "task", "arch", "epoch", "step", "objective")}
    about["pretrained_epochs"] = info["epoch"]
    return {**about, "sentiment": found, "notes": notes}


def report(result: dict) -> str:
    """What `evaluate_checkpoint` gives, for people to read."""
    sentiment = result["sentiment"]
    title = f"{result['checkpoint']}, step {result['step']}, {result['objective']}"
    unknown = " / ".join(f"{found['unknown_words']:.1f}" for found in sentiment.values())
    notes = [f"note: {note}" for note in result["notes"]]
    return "\n".join([title, f"unknown words: {unknown} %", *notes, summary(sentiment)])


def summary(sentiment: Mapping[str, dict]) -> str:
    """One line: "MR 77.5 % (827 of 1067), C 16; CR ...; constant 49.8 / 63.5; bag of words ..."."""
    found = list(sentiment.values())
    parts = [
        f"{name} {r['accuracy']:.1f} % ({r['correct']} of {r['of']}), C {r['C']:g}"
        for name, r in sentiment.items()
    ]
    for key in ("cross_validated", "nested"):
        if all(key in r for r in found):
            values = (f"{r[key]['accuracy']:.1f}" for r in found)
            title = key if key == "nested" else f"{found[0][key]['folds']} folds of the rest"
            parts.append(f"{title} {' / '.join(values)}")
    constants = (f"{r['constant']:.1f}" for r in found)
    bags = (f"{r['bag_of_words']['accuracy']:.1f}" for r in found)
    parts += [f"constant {' / '.join(constants)}", f"bag of words {' / '.join(bags)}"]
    return "; ".join(parts)
