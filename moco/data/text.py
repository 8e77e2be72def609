"""Text as sentences in order: reading, tokens, vocabulary, blocks of consecutive sentences.

A file has one sentence a line; a blank line is the border of two documents. In memory a text is one
flat array of word numbers (int32) with the end of each sentence: 60 MB for a million sentences.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from moco.errors import DataError

# A word with its apostrophes, else one character that is no space. For training and evaluation.
TOKEN = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
UNKNOWN = "<unk>"  # word number 0; as a token it is three
LONGEST_LINE = 2**20  # bytes
_XZ, _GZIP = b"\xfd7zXZ\x00", b"\x1f\x8b"


class Vocabulary:
    """Words by number; 0 stands for all others.

    Args:
        words: the first is `UNKNOWN`.
        lower: all words are lower-case, and so is what they are looked up for.
        length: tokens of a sentence that count, the first ones; None for all.
    """

    def __init__(self, words: Sequence[str], *, lower: bool, length: int | None = None) -> None:
        self.words, self.lower, self.length = list(words), lower, length
        self._number = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def numbers(self, sentence: str) -> list[int]:
        """Word numbers of a sentence; one unknown word where it has no token."""
        found = tokenize(sentence, lower=self.lower)[: self.length]
        return [self._number.get(word, 0) for word in found] or [0]

    def encode(self, sentences: Sequence[str]) -> Sentences:
        """Sentences of one document."""
        rows = [self.numbers(sentence) for sentence in sentences]
        ends = np.cumsum([0, *map(len, rows)])
        words = np.fromiter(itertools.chain.from_iterable(rows), np.int32, ends[-1])
        return Sentences(words, ends, np.zeros(len(rows), np.int32))


def tokenize(sentence: str, *, lower: bool) -> list[str]:
    """Words and punctuation, "don't, please" -> ["don't", ",", "please"]."""
    return TOKEN.findall(sentence.lower() if lower else sentence)


@dataclass(frozen=True)
class Sentences:
    """Sentences in order.

    Attributes:
        words: (T,) int32, word numbers of one sentence after another.
        ends: (N+1,) int64: sentence i is words[ends[i]:ends[i+1]].
        documents: (N,) int32: sentences of different documents are no neighbours.
    """

    words: np.ndarray
    ends: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)

    def require_neighbours(self, what: str, remedy: str) -> None:
        """Raise DataError where no two sentences in a row are of one document: losses are 0."""
        if not (self.documents[1:] == self.documents[:-1]).any():
            raise DataError(
                f"{what} has no two sentences in a row: a blank line, a document's border, "
                f"is between all of them; {remedy}"
            )

    def part(self, start: int, stop: int) -> Sentences:
        """Sentences start to stop - 1."""
        ends = self.ends[start : stop + 1]
        words = self.words[ends[0] : ends[-1]]
        return Sentences(words, ends - ends[0], self.documents[start:stop])

    def padded(self) -> tuple[Tensor, Tensor]:
        """Word numbers (N, longest) int64, 0 behind the end of a sentence; lengths (N,) int64."""
        lengths = np.diff(self.ends)
        padded = np.zeros((len(self), lengths.max()), np.int64)
        padded[np.arange(lengths.max()) < lengths[:, None]] = self.words
        return torch.from_numpy(padded), torch.from_numpy(lengths)

    def unknown_share(self) -> float:
        """Of the words, those that are not in the vocabulary."""
        return float((self.words == 0).mean()) if len(self.words) else 0.0


@dataclass(frozen=True)
class Text:
    """A text to train on, and its first sentences, held out."""

    train: Sentences
    val: Sentences
    vocabulary: Vocabulary

    def digest(self) -> str:
        """Of all that training sees, to tell texts apart."""
        sha = hashlib.sha256("\n".join(self.vocabulary.words).encode())
        for values in (self.train.words, self.train.ends, self.train.documents):
            sha.update(np.ascontiguousarray(values))
        return sha.hexdigest()[:16]


def read_text(
    path: str | os.PathLike,
    *,
    val_sentences: int,
    vocabulary: int,
    batch: int,
    lower: bool = True,
    length: int = 30,
    encoding: str = "utf-8",
) -> Text:
    """Read a text, plain or compressed by xz or gzip.

    The vocabulary is `UNKNOWN` and the most frequent words of the training sentences, as far as
    their first `length` tokens; of equally frequent ones those that came first.

    Args:
        val_sentences: so many from the beginning are held out, without a part in the vocabulary.
        vocabulary: size, at least 2.
        batch: training needs so many sentences.

    Raises:
        DataError: no text, too few sentences, a line that is no sentence, another encoding, a
            damaged file.
        FileNotFoundError: no such file.
    """
    numbers: defaultdict[str, int] = defaultdict(itertools.count().__next__)

    def numbered(sentence: str) -> Iterable[int]:
        return map(numbers.__getitem__, tokenize(sentence, lower=lower)[:length])

    found = _read(path, encoding, numbered)
    _check_count(path, len(found), val_sentences, batch)
    counts = np.bincount(found.words[found.ends[val_sentences] :], minlength=len(numbers))
    kept = np.argsort(-counts, kind="stable")[: vocabulary - 1]
    kept = kept[counts[kept] > 0]
    new = np.zeros(len(numbers), np.int32)
    new[kept] = np.arange(1, len(kept) + 1)
    known = list(numbers)
    found = Sentences(new[found.words], found.ends, found.documents)
    return Text(
        train=found.part(val_sentences, len(found)),
        val=found.part(0, val_sentences),
        vocabulary=Vocabulary(
            [UNKNOWN, *(known[number] for number in kept)], lower=lower, length=length
        ),
    )


def read_sentences(
    path: str | os.PathLike, vocabulary: Vocabulary, *, most: int, encoding: str = "utf-8"
) -> Sentences:
    """The first `most` sentences of a text, by a vocabulary that is there.

    Raises:
        DataError: as `read_text`; fewer than two sentences.
        FileNotFoundError: no such file.
    """
    found = _read(path, encoding, vocabulary.numbers, most)
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} sentence(s), one per line; expected at least 2")
    return found


def _read(
    path: str | os.PathLike,
    encoding: str,
    numbered: Callable[[str], Iterable[int]],
    most: int | None = None,
) -> Sentences:
    words, ends, documents = array("i"), array("q", [0]), array("i")
    for document, sentence in itertools.islice(_sentences(Path(path), encoding), most):
        words.extend(numbered(sentence))
        ends.append(len(words))
        documents.append(document)
    return Sentences(*map(np.asarray, (words, ends, documents)))  # no second copy


def _check_count(path: str | os.PathLike, found: int, held_out: int, batch: int) -> None:
    if not found:
        raise DataError(f"{path} has no line of text; expected one sentence per line")
    if found >= held_out + batch:
        return
    if found == 1:
        raise DataError(
            f"{path} has one line of text; expected one sentence per line, in order, with a blank "
            "line between documents"
        )
    raise DataError(
        f"{path} has {found} sentences (one per line); without {held_out} for validation fewer "
        f"than one batch of {batch} are left: lower --val-sentences or --batch-size"
    )


def _sentences(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """(document, sentence): lines that are not blank, and how many runs of blank ones came before,
    those at the beginning not counted."""
    document, fresh = 0, True
    for line in _lines(path, encoding):
        if line.isspace():
            document, fresh = document + (not fresh), True
        else:
            fresh = False
            yield document, line


def _lines(path: Path, encoding: str) -> Iterator[str]:
    with open(path, "rb") as raw, _unpacked(raw) as file:
        try:
            for number in itertools.count(1):
                line = file.readline(LONGEST_LINE)
                if not line:
                    return
                if len(line) == LONGEST_LINE:
                    raise DataError(
                        f"{path}: line {number} is longer than {LONGEST_LINE} bytes; expected one "
                        "sentence per line"
                    )
                text = line.decode(encoding)
                yield text.removeprefix("\ufeff") if number == 1 else text
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: line {number}, byte {error.start + 1} (0x{line[error.start]:02x}) is not "
                f"{encoding}; name the --encoding, such as latin-1"
            ) from None
        except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged: {error}; copy or download it again") from error


def _unpacked(raw: BinaryIO) -> BinaryIO:
    """A file's content, by its first bytes whatever its name."""
    head = raw.read(6)
    raw.seek(0)
    if head == _XZ:
        return io.BufferedReader(lzma.open(raw))
    if head[:2] == _GZIP:
        return io.BufferedReader(gzip.open(raw))
    return raw
