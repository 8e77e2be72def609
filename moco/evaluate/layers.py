"""Layers of an encoder that are evaluated, and networks of such a layer and a linear classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import checkpoint, encoders
from moco.alexnet import Chain
from moco.errors import CheckpointError

OUTPUT = "output"


class UnitOutput(nn.Module):
    """A whole network, its projection head included, and unit length: images -> (N, dim)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.network(images), dim=1)


def load_layer(path: str, layer: str | None = None) -> tuple[nn.Module, dict]:
    """The encoder in a file up to a layer, and its info as `load_encoder` gives it.

    Args:
        layer: "output", of unit length; what enters the head, which a chain calls "fc7" and others
            "backbone"; None for that of a classifier's file, else what enters the head.

    Returns:
        (module, info), where info has the layer's name as `layer`, its width as `feature_dim`.

    Raises:
        CheckpointError: no such layer, or a file without the projection head of "output".
    """
    encoder, info = checkpoint.load_encoder(path)
    before_head = "fc7" if isinstance(encoder, Chain) else "backbone"
    probed = info["args"].get("layer")
    layer = layer or probed or before_head
    layer = before_head if layer == "backbone" else layer
    if layer == OUTPUT:
        if probed not in (None, OUTPUT):
            raise CheckpointError(
                f"{path} is a probe of --layer {probed}: its classifier stands in place of the "
                f"projection head, so there is no --layer {OUTPUT}; give --layer {probed}, or the "
                "pretraining checkpoint and another --save-dir"
            )
        network, info = checkpoint.load_encoder(path, head="projection")
        last = encoders.get_head(network)
        width = (last[-1] if isinstance(last, nn.Sequential) else last).out_features
        return UnitOutput(network).eval(), {**info, "layer": layer, "feature_dim": width}
    if layer != before_head:
        raise CheckpointError(
            f"{path} holds a {info['arch']}, which has no --layer {layer} to evaluate; there are "
            f"{before_head} and {OUTPUT}"
        )
    return encoder, {**info, "layer": layer}


def lacks_statistics(encoder: nn.Module) -> bool:
    """Whether batch norm has never seen a batch: the encoder is untrained, and in eval mode a
    chain's features are about 0."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    means = [norm.running_mean for norm in norms if norm.running_mean is not None]
    return bool(means) and not any(mean.any() for mean in means)


def network_state(encoder: nn.Module, classifier: nn.Linear) -> dict[str, Tensor]:
    """State of encoder and classifier under names by which `load_layer` and `saved_classifier` find
    them: the classifier is the network's head, or stands beside a network whose head is needed."""
    own = classifier.state_dict()
    if isinstance(encoder, UnitOutput):
        state = {f"encoder_q.{name}": t for name, t in encoder.network.state_dict().items()}
        return state | {f"classifier.{name}": tensor for name, tensor in own.items()}
    name = encoders.head_name(encoder)
    return {**encoder.state_dict()} | {f"{name}.{key}": tensor for key, tensor in own.items()}


def saved_classifier(path: str) -> nn.Linear:
    """The linear classifier in a file that `network_state` was written to, or in another network.

    Raises:
        CheckpointError: there is none.
    """
    content = checkpoint.read_checkpoint(path)
    state = content.get("state_dict")
    weight = state.get("module.classifier.weight") if isinstance(state, dict) else None
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return encoders.get_head(checkpoint.load_encoder(path, head="linear")[0])
    classifier = nn.Linear(weight.shape[1], weight.shape[0])
    try:
        classifier.load_state_dict(
            {"weight": weight, "bias": state.get("module.classifier.bias", torch.zeros(0))}
        )
    except RuntimeError:
        raise CheckpointError(f"{path}: its classifier has no bias of its size") from None
    return classifier
