"""Start an encoder from the weights in a file (--init-from)."""

from __future__ import annotations

from torch import nn

from moco.checkpoint import load_encoder
from moco.encoders import head_name
from moco.errors import CheckpointError


def start_encoder(encoder: nn.Module, path: str, arch: str) -> str:
    """Load the weights of a file; what was found, for people to read.

    Of a pretraining file the projection head is taken too where it fits; of others the backbone.

    Args:
        encoder: with its head.
        arch: its name.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it holds no encoder, or another one than `arch`.
    """
    found_encoder, info = load_encoder(path)
    head = "starts from random weights"
    own = encoder.state_dict()
    if info["layout"] == "moco" and info["head"] != "none":
        with_head, _ = load_encoder(path, head="projection")
        if _shapes(with_head.state_dict()) == _shapes(own):
            found_encoder, head = with_head, "is the file's"
        else:
            head += f": the file's ({info['head']}) has another shape"
    found = found_encoder.state_dict()
    last = f"{head_name(encoder)}."
    wanted = {name: t for name, t in own.items() if not name.startswith(last)}
    if _shapes({name: t for name, t in found.items() if not name.startswith(last)}) != _shapes(
        wanted
    ):
        raise CheckpointError(
            f"--init-from: {path} holds a {info['arch']}"
            + (" with the small stem" if info["small_stem"] else "")
            + f", whose weights do not fit this run's {arch}; give the --arch, stem and image size "
            "that it was trained with"
        )
    encoder.load_state_dict({**own, **found})
    return f"{path} ({info['layout']} file of {info['arch']}); the projection head {head}"


def _shapes(state: dict) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
