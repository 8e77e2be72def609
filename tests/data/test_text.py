"""Text: what is a sentence, a document and a word, and what a file that is none is told."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from moco.data.text import LONGEST_LINE, Vocabulary, read_text, tokenize
from moco.errors import DataError

TEXT = """\ufeffHeld out entirely.


A cat, a dog.
A cat isn't a dog!

  \t
The dog runs.\r
"""


def written(folder: Path, text: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, **options):
    return read_text(path, **{"val_sentences": 1, "vocabulary": 50, "batch": 2, **options})


def as_words(text, sentences) -> list[list[str]]:
    words = [text.vocabulary.words[number] for number in sentences.words]
    return [words[a:b] for a, b in zip(sentences.ends, sentences.ends[1:], strict=False)]


def test_lines_are_sentences_and_blank_lines_borders(tmp_path) -> None:
    text = read(written(tmp_path, TEXT))
    assert as_words(text, text.train) == [
        ["a", "cat", ",", "a", "dog", "."],
        ["a", "cat", "isn't", "a", "dog", "!"],
        ["the", "dog", "runs", "."],
    ]
    first, second, third = text.train.documents
    assert text.val.documents[0] != first == second != third
    # Most frequent first, of equals the one that came first; held-out words are not known.
    assert text.vocabulary.words[:5] == ["<unk>", "a", "dog", ".", "cat"]
    assert as_words(text, text.val) == [["<unk>"] * 3 + ["."]]
    assert text.val.unknown_share() == 0.75


def test_vocabulary_case_and_length(tmp_path) -> None:
    path = written(tmp_path, TEXT)
    text = read(path, vocabulary=3, length=3, lower=False)
    assert text.vocabulary.words == ["<unk>", "A", "cat"]
    assert as_words(text, text.train)[1] == ["A", "cat", "<unk>"]
    assert text.digest() != read(path, vocabulary=4, length=3, lower=False).digest()
    assert text.digest() == read(path, vocabulary=3, length=3, lower=False).digest()


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_compressed_files_read_the_same_whatever_their_name(tmp_path, pack) -> None:
    plain = read(written(tmp_path, TEXT))
    packed = written(tmp_path, pack(TEXT.encode()), "packed")
    assert read(packed).digest() == plain.digest()
    damaged = written(tmp_path, pack(TEXT.encode() * 99)[:-20], "damaged.xz")
    with pytest.raises(DataError, match=r"damaged\.xz is damaged"):
        read(damaged)


def test_blocks_are_padded_behind_their_ends(tmp_path) -> None:
    text = read(written(tmp_path, TEXT))
    padded, lengths = text.train.part(1, 3).padded()
    assert lengths.tolist() == [6, 4] and padded.shape == (2, 6)
    assert padded[1, 4:].tolist() == [0, 0]
    both, _ = text.train.padded()
    assert padded.tolist() == both[1:].tolist()


def test_tokens_are_those_of_training(tmp_path) -> None:
    assert tokenize("Don't \u201cstop\u201d: 3.5 co-op_s", lower=True) == [
        "don't", "\u201c", "stop", "\u201d", ":", "3", ".", "5", "co", "-", "op_s",
    ]  # fmt: skip
    vocabulary = Vocabulary(["<unk>", "cat", "a"], lower=True, length=3)
    assert vocabulary.numbers("A cat <unk> cat") == [2, 1, 0]
    assert vocabulary.numbers(" \x85") == [0]
    encoded = vocabulary.encode(["a cat", "", "dog"])
    assert encoded.words.tolist() == [2, 1, 0, 0]
    assert encoded.ends.tolist() == [0, 2, 3, 4] and encoded.words.dtype == np.int32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no line of text; expected one sentence per line"),
        (b" \n\n", "has no line of text"),
        (b"all. in. one.", "has one line of text; expected one sentence per line"),
        (b"a\nb\n", "has 2 sentences .* fewer than one batch of 2 are left: lower --val-sentences"),
        (b"a" * LONGEST_LINE, "line 1 is longer than 1048576 bytes"),
        (b"a\nb\ncaf\xe9\n", r"line 3, byte 4 \(0xe9\) is not utf-8; name the --encoding"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, message) -> None:
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, content))


def test_another_encoding(tmp_path) -> None:
    text = read(written(tmp_path, b"a\nb\ncaf\xe9\n"), encoding="latin-1")
    assert as_words(text, text.train)[1] == ["caf\xe9"]
