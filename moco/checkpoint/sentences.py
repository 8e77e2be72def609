"""Sentence encoders from checkpoints of scripts/train_sentences.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from moco.checkpoint.content import saved_args, shown, warn_of_numbers
from moco.checkpoint.files import read_checkpoint
from moco.checkpoint.run_folder import run_checkpoints
from moco.errors import CheckpointError
from moco.sentence_encoders import QuickThought


def is_of_sentences(content: dict) -> bool:
    return saved_args(content).get("task") == "sentences"


def load_sentence_encoders(path: str | os.PathLike) -> tuple[QuickThought, dict[str, Any]]:
    """The encoders f and g that a checkpoint holds, in eval mode on the CPU, in float32.

    Args:
        path: a file, or a run folder, which stands for its newest checkpoint.

    Returns:
        (module, info). info has `checkpoint` (the file), `task`, `arch`, `epoch`, `step`,
        `objective`, `feature_dim` of each encoder, `vocabulary` (list of words, the first stands
        for all others), `lower` (words are lower-case) and `args`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, or one of another task.
    """
    if Path(path).is_dir():
        own = run_checkpoints(path)
        if not own:
            raise CheckpointError(f"{path} is a folder without checkpoints of train_sentences.py")
        path = own[-1]
    content = read_checkpoint(path)
    args, words = saved_args(content), content.get("vocabulary")
    if not is_of_sentences(content):
        raise CheckpointError(
            f"{path} is no checkpoint of scripts/train_sentences.py, which says so in its args; of "
            "image encoders main_lincls.py is the evaluation"
        )
    state = content.get("state_dict")
    state = {n.removeprefix("module."): t for n, t in state.items()} if _is_state(state) else {}
    embedding, recurrent = state.get("f.embedding.weight"), state.get("f.gru.weight_hh_l0")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{path} has no vocabulary, a list of words")
    if embedding is None or recurrent is None or embedding.dim() != 2 or recurrent.dim() != 2:
        raise CheckpointError(f"{path} has no f.embedding.weight and f.gru.weight_hh_l0")
    module = QuickThought(len(words), embedding.shape[1], recurrent.shape[1])
    warn_of_numbers(state, path)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path} does not fit a vocabulary of {len(words)}: {reason}"
        ) from error
    info = {
        "checkpoint": str(path),
        "task": "sentences",
        "arch": shown(content.get("arch")),
        "epoch": shown(content.get("epoch")),
        "step": shown(content.get("step")),
        "objective": shown(args.get("objective")),
        "feature_dim": 2 * recurrent.shape[1],
        "vocabulary": words,
        "lower": not args.get("case_sensitive", False),
        "args": args,
    }
    return module.eval(), info


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(t, Tensor) for t in value.values())
