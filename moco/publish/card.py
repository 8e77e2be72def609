"""The model card of a release: card.md.jinja, filled from what the release's files hold."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from moco.checkpoint import read_checkpoint
from moco.errors import CheckpointError
from moco.packages import import_optional
from moco.printable import markdown, markdown_code, printable
from moco.publish import export
from moco.publish import release_files as files
from moco.run_files import ARGS, LOG, read_log

# Terms of the objective: name in the arguments and logs, name in the formula.
_TERMS = {"align": "align(", "unif": "uniform(", "contr": "InfoNCE("}


def config_and_card(folder: Path, licence: object) -> tuple[dict, str]:
    """config.json, as timm reads it, and the text of README.md, from the other files of a release
    alone: equal files give equal text.

    Args:
        licence: identifier of the weights' licence; None: not stated.

    Raises:
        CheckpointError: a file is missing, or lacks a value, or holds one of another kind.
    """
    safetensors = files.only_weights(folder, "backbone", "safetensors")
    alone = files.is_encoder_only(folder)
    pth = safetensors if alone else files.only_weights(folder, "backbone", "pth")
    full = safetensors if alone else files.only_weights(folder, "full", "pth")
    network = export.load_with_head(full, keep="none")
    info = network.info
    config = export.timm_config(network, licence)
    if info["small_stem"]:
        config["small_stem"] = True
    weights = safetensors.name
    config["pretrained_cfg"]["hf_hub_filename"] = weights

    args = files.read_json(folder / ARGS, or_empty=True)
    args = {key: value for key, value in args.items() if value is not None}
    objective = printable(info["objective"] or "")
    terms = {term: args.get(f"{term}_w") for term in _TERMS}
    if None in terms.values():  # an older file, which has the formula alone
        terms = {term: name in objective for term, name in _TERMS.items()}
    log = read_log(folder / LOG)[0] if (folder / LOG).is_file() else []
    trained = [line for line in log if line["kind"] == "train"][-1:]
    losses = {term: line[term] for line in trained for term in _TERMS if term in line}
    result = files.read_json(folder / files.PROBE, or_empty=True)
    classifier_epoch = None
    if result and not alone:
        linear = read_checkpoint(files.only_weights(folder, "linear", "safetensors"))
        classifier_epoch = linear["classifier_epoch"]
    kinds = {  # of the files with weights, else None
        path: (files.WEIGHTS.fullmatch(path) or [None] * 3)[2]
        for path in sorted({*files.listed(folder), files.CONFIG} - {files.CARD})
    }
    template = _template()
    from jinja2 import TemplateError

    try:
        card = template.render(
            name=files.WEIGHTS.fullmatch(weights)[1],
            licence=licence,
            in_timm=_fits(network, "timm"),
            arch=network.arch,
            **{key: info[key] for key in ("small_stem", "feature_dim", "epoch")},
            objective=objective,
            terms=[term for term, weight in terms.items() if weight],
            step=read_checkpoint(full).get("step"),
            args=args,
            given=lambda *names: all(name in args for name in names),
            result=result,
            classifier_epoch=classifier_epoch,
            metrics=files.read_json(folder / files.METRICS, or_empty=True),
            losses=losses and {**losses, "step": trained[0]["step"]},
            files=kinds,
            safetensors=weights,
            usage=_usage(network, weights, pth.name, None if alone else full.name),
            in_detectron2=_fits(network, "detectron2"),
        )
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"no model card can be made of these files: {error}") from error
    return config, card


def _usage(
    network: export.LoadedEncoder, safetensors: str, pth: str, full: str | None
) -> list[tuple[str, str, str]]:
    """(title, language, lines) for each tool that has such a network."""
    hub = "this folder is a model repository as timm reads it (uploaded: `hf-hub:USER/NAME`)"
    tools = (
        ("torchvision", "torchvision", "python", pth),
        ("timm", "timm", "python", safetensors),
        ("huggingface", f"Hugging Face: {hub}", "python", "."),
        *([("upstream-moco", "facebookresearch/moco", "sh", full)] if full else []),
    )
    return [
        (title, language, export.usage(to, file, network))
        for to, title, language, file in tools
        # torchvision's network takes the small stem by hand.
        if _fits(network, to) or (to == "torchvision" and network.info["small_stem"])
    ]


def _fits(network: export.LoadedEncoder, to: str) -> bool:
    try:
        export.check_fits(network, to)
    except CheckpointError:
        return False
    return True


def check_packages() -> None:
    """Raise DataError unless jinja2 is there; to be called before work starts."""
    import_optional("jinja2", "a model card")


@functools.cache
def _template() -> Any:
    import jinja2
    from markupsafe import Markup

    def escaped(value: object) -> Markup:
        """A value of the template as Markdown; what is Markup already stays."""
        if isinstance(value, Markup):
            return value
        if isinstance(value, (list, tuple)):
            return Markup(f"[{', '.join(map(escaped, value))}]")
        return Markup(markdown(value))

    environment = jinja2.Environment(
        autoescape=True,  # so that macros give Markup; `finalize` comes before it
        finalize=escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = lambda value: Markup(markdown_code(value))
    environment.filters["line"] = lambda value: Markup(printable(value))
    return environment.from_string(
        Path(__file__).with_name("card.md.jinja").read_text(encoding="utf-8")
    )
