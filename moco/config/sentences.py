"""The config of scripts/train_sentences.py: text, two encoders, objective, optimisation."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moco.config.objective import check_terms, formula, number, slug
from moco.config.option import FREE, LEARNS, REQUIRED, ROUNDS, Part, flat_values, option
from moco.config.parts import Launch, Placement, check_batch, check_whole_batch
from moco.config.pretrain import PretrainSchedule, Saving, Speed


@dataclass(frozen=True, kw_only=True)
class SentenceData(Part):
    """data

    data: one sentence a line in order, a blank line between documents; perhaps .xz or .gz
    val_sentences: the first N are held out (%(default)s; 0: none)
    vocab: words that are known: <unk> and the most frequent of the training sentences (%(default)s)
    case_sensitive: keep capitals
    length: tokens of a sentence that are read (%(default)s)
    across_documents: neighbours on both sides of a document's border are positives too, as in the
        original code
    encoding: of the text (%(default)s)
    """

    data: str = option(REQUIRED, "data", FREE, kind="path", metavar="TEXT")
    val_sentences: int = option(50_000, "--val-sentences", LEARNS, least=0)
    vocab: int = option(50_001, "--vocab", LEARNS, least=2)
    case_sensitive: bool = option(False, "--case-sensitive", LEARNS)
    length: int = option(30, "--length", LEARNS, least=1)
    across_documents: bool = option(False, "--across-documents", LEARNS)
    encoding: str = option("utf-8", "--encoding", FREE, metavar="NAME")
    workers: int = option(0, "", FREE)  # a text is read once, into memory

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_sentences == 1:
            raise ValueError("--val-sentences must be 0 or at least 2: one sentence has no pair")
        try:
            bytewise = codecs.lookup(self.encoding).encode("\n")[0] == b"\n"
        except (LookupError, TypeError, ValueError):  # the last ones of codecs that are no text's
            raise ValueError(f"--encoding: no such encoding: {self.encoding!r}") from None
        if not bytewise:
            raise ValueError(
                f"--encoding {self.encoding}: its lines do not end in one byte; convert the text, "
                f"iconv -f {self.encoding} -t utf-8 TEXT"
            )


@dataclass(frozen=True, kw_only=True)
class SentenceEncoders(Part):
    """two encoders f and g: word embeddings and a bidirectional GRU each, with nothing in common

    emb: dimension of the word embeddings (%(default)s)
    hidden: units of the GRU in each direction; a sentence has 2N features by f, 2N by g
        (%(default)s)
    """

    arch: str = option("bigru", "", LEARNS)
    emb: int = option(620, "--emb", LEARNS, least=1)
    hidden: int = option(600, "--hidden", LEARNS, least=1)


@dataclass(frozen=True, kw_only=True)
class SentenceObjective(Part):
    """objective: contr_w * contrastive(tau) + align_w * align(alpha) + unif_w * uniform(t), over
    the sentences of a batch and their neighbours

    contr_w: weight of the contrastive loss (default 1)
    contr_tau: its temperature (default 0.075; 1 with --no-normalize)
    align_w: weight of alignment (default 0)
    align_alpha: its exponent (default 2)
    align_pairs: both: each sentence of f with both neighbours of g, as in the contrastive loss;
        forward: with the next one only, as the paper prints (%(default)s)
    unif_w: weight of uniformity, summed over f and g (default 0)
    unif_t: its t (default 2)
    normalize: features of any length, and the similarity of a sentence with itself is set to 0: the
        original Quick-Thought loss
    """

    contr_w: float = number(1.0, "--contr-w")
    contr_tau: float = number(0.075, "--contr-tau")
    align_w: float = number(0.0, "--align-w")
    align_alpha: float = number(2.0, "--align-alpha")
    align_pairs: str = option("both", "--align-pairs", LEARNS, choices=("both", "forward"))
    unif_w: float = number(0.0, "--unif-w")
    unif_t: float = number(2.0, "--unif-t")
    normalize: bool = option(True, "--no-normalize", LEARNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_terms(self, {"contr_tau": 0, "align_alpha": 1, "unif_t": 0})
        if not self.normalize and (self.align_w or self.unif_w):
            raise ValueError(
                "--no-normalize has the contrastive loss only: alignment and uniformity are of "
                "features of unit length"
            )

    @classmethod
    def from_options(cls, given: dict) -> SentenceObjective:
        if not given["normalize"]:
            given.setdefault("contr_tau", 1.0)
        return cls(**given)

    def slug(self) -> str:
        """As part of a folder's name."""
        raw = "" if self.normalize else "raw"
        return slug(vars(self), contr=f"contr{{:g}}{raw}", align="align{:g}", unif="unif{:g}")


def sentence_formula(values: Mapping[str, Any]) -> str:
    """The objective as a formula for people to read, from its numbers by their flat names."""
    raw = "" if values["normalize"] else ", raw features, diagonal 0"
    pairs = "" if values["align_pairs"] == "both" else ", forward pairs"
    return formula(
        values,
        contr=f"contrastive(tau={{:g}}{raw})",
        align=f"align(alpha={{:g}}{pairs})",
        unif="uniform(t={:g}, summed over f and g)",
    )


@dataclass(frozen=True, kw_only=True)
class SentenceOptim(Part):
    """optimisation: Adam

    batch_size: consecutive sentences, over all processes (%(default)s)
    lr: learning rate (%(default)s)
    clip: longest gradient, by the norm of all of it; longer ones are shortened (%(default)s;
        0: none are)
    seed: of the initial weights; default: one is drawn, printed and saved
    accumulate: main_moco.py's; 1 only, since losses within the batch need all of it at once
    """

    batch_size: int = option(400, "-b --batch-size", LEARNS, least=2)
    lr: float = option(5e-4, "--lr --learning-rate", LEARNS, least=0, kind="rate")
    clip: float = option(0.5, "--clip", LEARNS, least=0, kind="rate")
    seed: int | None = option(None, "--seed", LEARNS, least=0)
    seed_given: bool = option(False, "", FREE)
    accumulate: int = option(1, "--accumulate", LEARNS, least=1)
    # What the engine has for images only.
    amp: str = option("off", "", LEARNS)
    init_from: str | None = option(None, "", LEARNS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None and self.seed >= 2**63:
            raise ValueError(f"--seed must be below 2^63, got {self.seed}")
        check_whole_batch(self.accumulate)


@dataclass(frozen=True, kw_only=True)
class SentenceSchedule(PretrainSchedule):
    """schedule"""

    epochs: int = option(1, "--epochs", LEARNS, least=0)
    schedule: tuple[int, ...] = option(
        (), "--schedule", LEARNS, kind="numbers", metavar="EPOCH ..."
    )


@dataclass(frozen=True, kw_only=True)
class SentenceSpeed(Speed):
    """speed"""

    channels_last: bool = option(False, "", ROUNDS)
    compile: bool = option(False, "", ROUNDS)


@dataclass(frozen=True, kw_only=True)
class SentenceWatching(Part):
    """watching

    evaluate_every: alignment and uniformity of the held-out sentences every N steps, and at the end
        (%(default)s; 0: at the end only)
    check_every: steps between proofs that ranks are equal (%(default)s; 0: never)
    collapse_steps: warn after N steps with collapsed features (%(default)s; 0: never)
    """

    evaluate_every: int = option(1000, "--evaluate-every", FREE, least=0)
    max_overflows: int = option(20, "", FREE)
    check_every: int = option(1000, "--check-every", FREE, least=0)
    collapse_steps: int = option(500, "--collapse-steps", FREE, least=0)


@dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """All of scripts/train_sentences.py."""

    data: SentenceData
    encoder: SentenceEncoders = SentenceEncoders()
    objective: SentenceObjective = SentenceObjective()
    optim: SentenceOptim = SentenceOptim()
    schedule: SentenceSchedule = SentenceSchedule()
    speed: SentenceSpeed = SentenceSpeed()
    saving: Saving = Saving()
    watching: SentenceWatching = SentenceWatching()
    launch: Launch = Launch()
    placement: Placement = Placement()

    def __post_init__(self) -> None:
        check_batch(self.optim, self.placement)

    def to_flat(self) -> dict[str, Any]:
        """The values by their flat names, as JSON and `weights_only` can hold them."""
        values = flat_values(self)
        return {**values, "task": "sentences", "objective": sentence_formula(values)}
