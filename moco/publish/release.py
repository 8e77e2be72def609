#!/usr/bin/env python
"""Make a folder to publish from a pretraining checkpoint, and check one that was downloaded.

    python scripts/release.py RUN/checkpoint_0199.pth.tar OUT
    python scripts/release.py RUN/checkpoint_0199.pth.tar OUT --lincls LINCLS_RUN/checkpoint.pth.tar
    python scripts/release.py --verify OUT

OUT holds NAME-backbone-HASH and NAME-full-HASH (the state dict of both encoders with heads, and the
queue; no optimizer), with --lincls also NAME-linear-HASH (the backbone with its linear classifier),
each as .pth and .safetensors, HASH being the first 8 hex digits of the file's SHA-256 as torch.hub
checks them; config.json; arguments, logs and results, in which paths of this machine are cut to
their last name; README.md, a model card that says what these files say and nothing else; and
SHA256SUMS. It is made whole or not at all, and verified before it gets its name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import (
    checkpoint,  # noqa: E402
    cli,
)
from moco.errors import CheckpointError  # noqa: E402
from moco.publish import export  # noqa: E402
from moco.run_files import LINCLS_LATEST, LINCLS_RESULT, write_json  # noqa: E402

SUMS, CARD, CONFIG, ARGS, LOG = "SHA256SUMS", "README.md", "config.json", "args.json", "log.jsonl"
LINCLS, METRICS = "lincls", "align_uniform.json"
WEIGHTS = re.compile(r"([A-Za-z0-9_-]+)-(backbone|full|linear)-([0-9a-f]{8})\.(pth|safetensors)")

# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="make or verify a release", allow_abbrev=False)
    # fmt: off
    parser.add_argument("checkpoint", type=cli.non_empty, nargs="?", metavar="CHECKPOINT",
                        help="of pretraining, in its run folder")
    parser.add_argument("out", type=cli.non_empty, nargs="?", metavar="OUT",
                        help="folder to make")
    parser.add_argument("--lincls", type=cli.non_empty, metavar="FILE",
                        help="checkpoint of main_lincls.py on CHECKPOINT, in its run folder")
    parser.add_argument("--metrics", type=cli.non_empty, metavar="FILE",
                        help="what measure_align_uniform.py --out has written of CHECKPOINT")
    parser.add_argument("--name", help="of the files (default: that of OUT)")
    parser.add_argument("--licence", "--license", metavar="ID",
                        help="of the weights, such as mit or cc-by-nc-4.0, which is for you to "
                             "decide (default: the card says that none is stated)")
    parser.add_argument("--verify", type=cli.non_empty, metavar="FOLDER",
                        help="check a release instead: sums, names, weights, config, card")
    # fmt: on
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    if args.verify:
        if args.checkpoint or args.lincls or args.metrics or args.name or args.licence:
            parser.error("--verify takes a folder and nothing else")
        if not Path(args.verify).is_dir():
            parser.error(f"--verify: no such folder: {args.verify}")
        return args
    if args.checkpoint is None or args.out is None:
        parser.error("give CHECKPOINT and OUT, or --verify FOLDER")
    for flag in ("checkpoint", "lincls", "metrics"):
        path = getattr(args, flag)
        if path and not Path(path).is_file():
            parser.error(f"{flag}: no such file: {path}")
    out = args.out = Path(args.out).resolve()
    if not out.parent.is_dir():
        parser.error(f"no such folder: {out.parent}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} exists and is not an empty folder; choose another OUT")
    # No dot: torch.hub takes what is between the first "-" and "." that fit for the hash.
    args.name = re.sub(r"[^A-Za-z0-9_-]+", "-", out.name) if args.name is None else args.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", args.name):
        parser.error(f"--name must be letters, digits, - and _, got {args.name!r}")
    if args.licence is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", args.licence):
        parser.error(f"--licence must be an identifier such as cc-by-nc-4.0, got {args.licence!r}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with cli.report_user_errors():
        if not args.verify:
            release(args)
            return
        found = problems(Path(args.verify))
        for problem in found:
            print(f"{args.verify}: {problem}", file=sys.stderr)
        if found:
            sys.exit(1)
        print(f"{args.verify}: verified {len(read_sums(Path(args.verify)))} files")


# ------------------------------------------------------------------------------------------------
# Make
# ------------------------------------------------------------------------------------------------


def release(args: argparse.Namespace) -> None:
    """Build the folder under another name, verify it, and rename it to `args.out`.

    Raises:
        CheckpointError, OSError: nothing was written.
    """
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}.") as temporary:
        folder = Path(temporary) / args.out.name
        folder.mkdir()
        build(folder, args)
        found = problems(folder)
        if found:
            raise CheckpointError(f"nothing was released: {'; '.join(found)}")
        folder.replace(args.out)
    print(f"wrote {args.out}, verified:")
    for path in listed(args.out):
        print(f"  {(args.out / path).stat().st_size / 2**20:8.2f} MiB  {path}")


def build(folder: Path, args: argparse.Namespace) -> None:
    content = checkpoint.read_checkpoint(args.checkpoint)
    network = export.load_network(args.checkpoint, keep="none")
    if network.info["layout"] != "moco":
        raise CheckpointError(
            f"{args.checkpoint} is no pretraining checkpoint (layout: {network.info['layout']}), "
            "which holds both encoders; scripts/convert.py converts a single encoder"
        )
    about = network.about()
    write_weights(folder, f"{args.name}-backbone", export.write_torchvision, network)

    named = content.get("state_dict", content)  # safetensors of others hold nothing else
    state = {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
    said = {key: content[key] for key in ("step",) if key in content} | about

    def write_full(path: Path, state: dict[str, Tensor]) -> None:
        if path.suffix == ".safetensors":
            checkpoint.write_safetensors(path, state, said)
        else:
            version = {"version": checkpoint.FORMAT_VERSION}
            checkpoint.write_checkpoint(path, {**version, **said, "state_dict": state})

    write_weights(folder, f"{args.name}-full", write_full, state)

    write_json(folder / CONFIG, config_of(folder, network, args.licence))
    copy_run(Path(args.checkpoint).parent, folder, about["args"], content.get("step"))
    if args.lincls:
        copy_lincls(Path(args.lincls), folder, args.name, network)
    if args.metrics:
        copy_metrics(Path(args.metrics), folder, Path(args.checkpoint).name)
    text = card(folder, args.name, network, args.licence)
    (folder / CARD).write_text(text, encoding="utf-8")
    sums = "".join(f"{sha256(folder / path)}  {path}\n" for path in listed(folder))
    (folder / SUMS).write_text(sums, encoding="utf-8")


def config_of(folder: Path, network: export.Network, licence: str | None) -> dict:
    """config.json as timm reads it, of the release's backbone."""
    config = export.timm_config(network, licence)
    if network.info["small_stem"]:
        config["small_stem"] = True
    config["pretrained_cfg"]["hf_hub_filename"] = weights_of(folder, "backbone", "safetensors").name
    return config


def write_weights(
    folder: Path, name: str, write: Callable[[Path, object], None], what: object
) -> None:
    """Have `write(path, what)` make a .pth and a .safetensors file, and name each by its hash."""
    for suffix in (".pth", ".safetensors"):
        path = folder / f"{name}{suffix}"
        write(path, what)
        path.rename(folder / f"{name}-{sha256(path)[:8]}{suffix}")


def copy_run(run: Path, folder: Path, said: dict, step: int | None) -> None:
    """The arguments that the checkpoint holds, and of the run folder around it the log up to the
    checkpoint and what code ran, if the folder is of the same run."""
    if not said:
        return  # not of this project
    if (run / ARGS).is_file():
        of_folder = read_json(run / ARGS)
        same = ("arch", "objective", "seed")
        if all(of_folder.get(name) == said.get(name) for name in same):
            if "provenance" in of_folder:
                said = {**said, "provenance": of_folder["provenance"]}
            if (run / LOG).is_file():
                copy_log(run / LOG, folder / LOG, said_with_paths=of_folder, last_step=step)
    write_json(folder / ARGS, said)


def copy_log(source: Path, out: Path, *, said_with_paths: dict, last_step: int | None) -> None:
    """The lines up to `last_step`, with paths cut."""
    lines = [
        json.dumps(cut_paths(line, said_with_paths)) + "\n"
        for line in read_log(source)
        if last_step is None or line.get("step", 0) <= last_step
    ]
    out.write_text("".join(lines), encoding="utf-8")


def cut_paths(said: dict, args: dict) -> dict:
    """`export.without_paths` of what a run has written, by the places in its arguments too."""
    places = {key: args[key] for key in export.PLACES if key in args}
    kept = export.without_paths({**places, **said})
    return {key: kept[key] for key in said if key in kept}


def copy_lincls(source: Path, folder: Path, name: str, pretrained: export.Network) -> None:
    """The classifier, arguments, log and result of a linear evaluation of this very encoder.

    Raises:
        CheckpointError: it is of another encoder or of fine-tuning, or its result is not beside it.
    """
    result = source.parent / LINCLS_RESULT
    if source.name == result.name:  # the result stands for its run
        source = source.with_name(LINCLS_LATEST)
    for path in (result, source):
        if not path.is_file():
            raise CheckpointError(f"--lincls {source}: there is no {path.name} beside it")
    said = read_json(result)
    if said.get("evaluation") == "finetune":
        raise CheckpointError(
            f"--lincls {source} is of fine-tuning, which has changed the encoder: its accuracy is "
            "none of this one; give a linear evaluation (main_lincls.py without --finetune)"
        )
    if not {"best", "last"} <= said.keys():
        raise CheckpointError(
            f"--lincls {source}: {result.name} beside it has no best and last accuracy, as a "
            "training of main_lincls.py leaves them there"
        )
    network = export.load_network(source)
    if not network.classifier:
        raise CheckpointError(f"--lincls {source} holds no linear classifier")
    if not same_tensors(network.encoder.state_dict(), pretrained.encoder.state_dict()):
        raise CheckpointError(
            f"--lincls {source} is not a probe of this encoder: its backbone has other weights "
            "(another checkpoint, or fine-tuned)"
        )
    content = checkpoint.read_checkpoint(source)
    args = checkpoint.saved_args(content)
    about = {**network.about(), "classifier_epoch": content.get("epoch", 0) - 1}

    def write(path: Path, network: export.Network) -> None:
        if path.suffix == ".safetensors":
            checkpoint.write_safetensors(path, network.state(), about)
        else:
            export.write_torchvision(path, network)

    write_weights(folder, f"{name}-linear", write, network)
    out = folder / LINCLS
    out.mkdir()
    write_json(out / result.name, cut_paths(said, args))
    if (source.parent / ARGS).is_file():
        write_json(out / ARGS, export.without_paths(read_json(source.parent / ARGS)))
    if (source.parent / LOG).is_file():
        copy_log(source.parent / LOG, out / LOG, said_with_paths=args, last_step=None)


def copy_metrics(source: Path, folder: Path, name: str) -> None:
    said = read_json(source)
    numbers = ("alignment", "uniformity", "alpha", "t", "images")
    if not all(isinstance(said.get(name), (int, float)) for name in numbers) or "layer" not in said:
        raise CheckpointError(
            f"--metrics {source} has no alignment and uniformity, as measure_align_uniform.py "
            "--out writes them"
        )
    if Path(str(said.get("checkpoint"))).name != name:
        raise CheckpointError(
            f"--metrics {source} is of {said.get('checkpoint')}, the release of {name}"
        )
    write_json(folder / METRICS, export.without_paths(said))


# ------------------------------------------------------------------------------------------------
# Card
# ------------------------------------------------------------------------------------------------


def card(folder: Path, name: str, network: export.Network, licence: str | None) -> str:
    """The model card. Its tables are `figures(folder)`; a section without any is left out."""
    tables = figures(folder)
    is_resnet = export.takes_any_size(network.encoder) and not network.info["small_stem"]
    parts = [front_matter(licence, in_timm=is_resnet), f"# {name}\n", introduction(network)]
    for title, rows in tables.items():
        if rows:
            table = "".join(f"| {label} | {value} |\n" for label, value in rows)
            note = f"{NOTES[title]}\n\n" if title in NOTES else ""
            parts.append(f"## {title}\n\n{note}| | |\n|---|---|\n{table}")
    parts += [files_section(folder), loading_section(folder, network), licence_section(licence)]
    parts.append(CITATION)
    return "\n".join(parts)


NOTES = {
    "Linear evaluation": "A linear classifier on the frozen encoder, in percent of the validation "
    "images.",
    "Alignment and uniformity": "L_align = mean \\|f(x) - f(x')\\|^alpha over two views of each "
    "image and L_uniform = log mean exp(-t \\|f(x) - f(y)\\|^2) over pairs of images "
    "(arXiv:2005.10242); smaller is better for both.",
}


def front_matter(licence: str | None, *, in_timm: bool) -> str:
    lines = [f"license: {licence.lower()}"] if licence else []
    lines += ["library_name: timm"] if in_timm else []
    lines += ["pipeline_tag: image-feature-extraction"]
    lines += ["tags:", "- self-supervised-learning", "- moco", "- alignment-uniformity"]
    return "\n".join(["---", *lines, "---\n"])


def introduction(network: export.Network) -> str:
    """What this is, and the objective in formulas."""
    objective = network.info["objective"]
    text = (
        f"An image encoder ({network.arch}) that was pretrained without labels by momentum "
        "contrast (MoCo, arXiv:1911.05722).\n"
    )
    if not objective:
        return text
    terms = {
        "align(": "align(alpha) = mean_i |q_i - k_i|^alpha",
        "uniform(": "uniform(t) = log mean_{i,j} exp(-t |x_i - x_j|^2)",
        "InfoNCE(": "InfoNCE(tau) = mean_i -log( exp(<q_i, k_i> / tau) / "
        "(exp(<q_i, k_i> / tau) + sum_j exp(<q_i, queue_j> / tau)) )",
    }
    used = [formula for term, formula in terms.items() if term in objective]
    return (
        f"{text}\n## Objective\n\n    loss = {objective}\n\n"
        + "".join(f"    {formula}\n" for formula in used)
        + "\nwith queries q_i, keys k_i of the momentum encoder and a queue of earlier keys, all "
        "of unit length; the pairs x_i, x_j are of queries with the queue and, where the objective "
        "says so, with each other.\n"
    )


def figures(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """{section: [(what, value)]}, from the files of the release alone: what is in none of them is
    not here either."""
    full = weights_of(folder, "full", "pth")
    info = checkpoint.load_encoder(full)[1]
    args = read_json(folder / ARGS) if (folder / ARGS).is_file() else {}
    log = read_log(folder / LOG) if (folder / LOG).is_file() else []
    probe = folder / LINCLS / LINCLS_RESULT
    metrics = folder / METRICS
    tables = {
        "Recipe": recipe(info, args, checkpoint.read_checkpoint(full).get("step")),
        "Linear evaluation": accuracy(folder) if probe.is_file() else (),
        "Alignment and uniformity": (
            *(measured(read_json(metrics)) if metrics.is_file() else ()),
            *training_losses(log),
        ),
    }
    return {
        title: [(in_table(label), in_table(value)) for label, value in rows]
        for title, rows in tables.items()
    }


def in_table(text: str) -> str:
    """On one line, and without what ends a cell."""
    return " ".join(text.replace("|", "/").split())


def recipe(info: dict, args: dict, step: int | None) -> Iterator[tuple[str, str]]:
    stem = ", 3x3 stem without pooling" if info["small_stem"] else ""
    yield "Encoder", f"{info['arch']}{stem}, {info['feature_dim']} features"
    if info["objective"]:
        yield "Objective", info["objective"]
    if info["epoch"] is not None:
        of = f" of {args['epochs']}" if "epochs" in args else ""
        steps = f", {step} steps" if step is not None else ""
        yield "Epochs", f"{info['epoch']}{of}{steps}"
    rows = (
        ("Data", "{images} images of `{data}` ({dataset})"),
        ("Of each class", "the first {images_per_class}"),
        ("Seen at", "{image_size} px, mean {mean}, std {std}"),
        ("Augmentation", "{augmentation}, area {crop_scale}"),
        ("Batch size", "{batch_size} over {processes} process(es), batch norm in groups of "
         "{bn_group_size}"),
        ("Optimizer", "SGD, lr {lr}, momentum {momentum}, weight decay {weight_decay}"),
        ("Learning rate", "{decay}, {warmup_epochs} epochs of warm-up"),
        ("Queue", "{moco_k} keys of {moco_dim} dimensions"),
        ("Momentum of the key encoder", "{moco_m}"),
        ("Projection head", "{head}"),
        ("Precision", "{precision}"),
        ("Seed", "{seed}"),
    )  # fmt: skip
    known = {key: value for key, value in args.items() if value is not None}
    if "aug_plus" in args:
        blur = "" if args.get("blur", True) or not args["aug_plus"] else " without blur"
        known["augmentation"] = f"MoCo {'v2' if args['aug_plus'] else 'v1'}{blur}"
    if args.get("cos"):
        known["decay"] = "cosine"
    elif "schedule" in args:
        known["decay"] = f"x{args.get('schedule_factor', 0.1)} at epochs {args['schedule']}"
    if "mlp" in args:
        known["head"] = "two layers (MLP)" if args["mlp"] else "one linear layer"
    if "amp" in args:
        known["precision"] = "float32" if args["amp"] == "off" else f"mixed, {args['amp']}"
    for label, template in rows:
        if all(name in known for name in re.findall(r"{(\w+)}", template)):
            yield label, template.format(**known)
    if "provenance" in args:
        yield "Code", ", ".join(f"{name} {version}" for name, version in args["provenance"].items())


def accuracy(folder: Path) -> Iterator[tuple[str, str]]:
    result = read_json(folder / LINCLS / LINCLS_RESULT)
    top5 = f"top-{min(5, result['classes'])}"
    protocol = result.get("protocol", {})
    # What sets a figure apart from those of the standard protocol stands in its own row.
    part = labels_used(result)
    apart = part + (", cached features" if result.get("evaluation") == "cached" else "")
    for which in ("last", "best"):
        at = result[which]
        setting = f" (lr {at['lr']:g}, weight decay {at['weight_decay']:g})" if "lr" in at else ""
        yield (
            f"{which.capitalize()} epoch ({at['epoch']}){apart}",
            f"top-1 {at['top1']:.2f}, {top5} {at['top5']:.2f}{setting}",
        )
    if "folds" in result:
        chosen = result["folds"]["chosen"]
        yield (
            "Chosen among",
            f"{len(result['folds']['settings'])} settings by {result['folds']['count']} folds of "
            f"the training images: lr {chosen['lr']:g}, weight decay {chosen['weight_decay']:g}",
        )
    elif "heads" in result:
        yield (
            "Chosen among",
            f"{len(result['heads'])} settings by their accuracy on the validation images, which "
            "flatters",
        )
    said = checkpoint.read_checkpoint(weights_of(folder, "linear", "safetensors"))
    yield "Classifier in the file", f"that of epoch {said['classifier_epoch']}"
    yield (
        "Evaluated on",
        f"{result['train_images']} for training, {result['val_images']} for validation, "
        f"{result['classes']} classes",
    )
    if protocol:
        yield "Protocol", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in protocol.items())
    knn = result.get("knn")
    if knn:
        yield (
            f"k-NN (k {knn['k']}, temperature {knn['temperature']}, {knn['layer']}){part}",
            f"top-1 {knn['top1']:.2f}, {top5} {knn['top5']:.2f}",
        )


def labels_used(result: dict) -> str:
    """Which of the labels, in words that follow others; "" for all of them."""
    if "labels" in result:
        of = result["labels"]["of"]
        return f", {of:g} % of the labels" if not isinstance(of, str) else f", labels of {of} alone"
    per_class = result.get("protocol", {}).get("images_per_class")
    return f", {per_class} images of each class" if per_class else ""


def measured(said: dict) -> Iterator[tuple[str, str]]:
    of = f"{said['layer']}, {said['images']} images"
    yield f"Held-out L_align (alpha {said['alpha']:g}; {of})", f"{said['alignment']:.4f}"
    yield f"Held-out L_uniform (t {said['t']:g}; {of})", f"{said['uniformity']:.4f}"
    if "uniformity_infimum" in said:
        yield f"Least possible L_uniform (t {said['t']:g})", f"{said['uniformity_infimum']:.4f}"


def training_losses(log: list[dict]) -> Iterator[tuple[str, str]]:
    """The last means that training logged."""
    lines = [line for line in log if line.get("kind") == "train"]
    for name, label in (("align", "align"), ("unif", "uniform"), ("contr", "InfoNCE")):
        if lines and name in lines[-1]:
            yield f"Training {label} term at step {lines[-1]['step']}", f"{lines[-1][name]:.4f}"


def files_section(folder: Path) -> str:
    what = {
        "backbone": "the encoder under torchvision's names, without a last layer",
        "full": "both encoders with their heads and the queue; no optimizer state",
        "linear": "the encoder with the linear classifier",
    }
    lines = []
    for path in listed(folder):
        match = WEIGHTS.fullmatch(path)
        lines.append(f"- `{path}`" + (f": {what[match[2]]}" if match else ""))
    return "\n".join(
        ["## Files\n", *lines, f"- `{SUMS}`\n",
         "`sha256sum -c SHA256SUMS` checks their bytes, `python scripts/release.py --verify "
         "FOLDER` of the project also what they hold and this page. In arguments and logs, paths "
         "were cut to their last name.\n"]
    )  # fmt: skip


def loading_section(folder: Path, network: export.Network) -> str:
    pth, safe = (weights_of(folder, "backbone", s).name for s in ("pth", "safetensors"))
    full = weights_of(folder, "full", "pth").name

    def block(kind: str, text: str) -> str:
        return f"```{kind}\n{text}\n```\n"

    parts = [
        "## Load\n",
        "Run in this folder. Images are RGB in [0, 1], then (x - mean) / std as above.\n",
        "This project:\n",
        block("python", f"from moco.checkpoint import load_encoder\n\n"
              f"encoder, info = load_encoder({safe!r})"),
    ]  # fmt: skip
    if network.arch == "resnet50" and not network.info["small_stem"]:
        hub = f'torch.hub.load(CLONE, "resnet50_encoder", weights={safe!r}, source="local")'
        parts += [f"torch.hub, with CLONE a clone of this project: `{hub}`\n"]
    converts = ["onnx"]
    for to, title, file in (
        ("torchvision", "torchvision", pth),
        ("timm", "timm", safe),
        ("huggingface", "Hugging Face: this folder is a model repository as timm reads it "
         "(uploaded: `hf-hub:USER/NAME`)", "."),
        ("upstream-moco", "facebookresearch/moco", full),
        ("detectron2", "", ""),
    ):  # fmt: skip
        try:
            export.check_fits(network, to)
        except CheckpointError:
            if to != "torchvision" or not network.info["small_stem"]:
                continue  # torchvision's network takes the small stem by hand
        if to == "detectron2":
            converts.insert(0, to)
        else:
            kind = "sh" if to == "upstream-moco" else "python"
            parts += [f"{title}:\n", block(kind, export.usage(to, file, network))]
    parts += [
        f"{' and '.join(converts)}, by this project's converter:\n",
        block("sh", "\n".join(f"python scripts/convert.py {safe} --to {to}" for to in converts)),
    ]
    return "\n".join(parts)


def licence_section(licence: str | None) -> str:
    said = (
        f"The weights: {licence}."
        if licence
        else "Those who released these weights have stated no licence for them."
    )
    return f"## Licence\n\n{said} The project's code: MIT.\n"


CITATION = """\
## Citation

```bibtex
@inproceedings{wang2020hypersphere,
  title={Understanding Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere},
  author={Wang, Tongzhou and Isola, Phillip},
  booktitle={International Conference on Machine Learning},
  pages={9929--9939},
  year={2020}
}
```

MoCo: arXiv:1911.05722 and arXiv:2003.04297.
"""  # noqa: E501


# ------------------------------------------------------------------------------------------------
# Verify
# ------------------------------------------------------------------------------------------------


def problems(folder: Path) -> list[str]:
    """What is wrong with a release, one line each; [] when nothing is."""
    found = check_sums(folder)
    if found:
        return found  # the rest would be about other bytes
    for what, check in (
        ("weights", check_weights), (CONFIG, check_config), (LINCLS, check_lincls),
        (CARD, check_card),
    ):  # fmt: skip
        try:
            found += check(folder)
        except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__} {e}" if isinstance(e, LookupError) else e
            return [*found, f"{what}: {' '.join(str(reason).split())}"]
    return found


def check_sums(folder: Path) -> list[str]:
    if not (folder / SUMS).is_file():
        return [f"{SUMS} is missing, so this is no release"]
    try:
        sums = read_sums(folder)
    except ValueError as error:
        return [str(error)]
    found = [f"{path} is missing" for path in sums if not (folder / path).is_file()]
    for path in listed(folder):
        if path not in sums:
            found.append(f"{path} is not in {SUMS}")
            continue
        digest = sha256(folder / path)
        if digest != sums[path]:
            found.append(f"{path} has another SHA-256 than {SUMS} says: it was changed or damaged")
        match = WEIGHTS.fullmatch(path)
        if match and match[3] != digest[:8]:
            found.append(f"{path} has {match[3]} in its name, its SHA-256 begins with {digest[:8]}")
    found += [
        f"there is no NAME-{kind}-HASH.{suffix}"
        for kind in ("backbone", "full")
        for suffix in ("pth", "safetensors")
        if not weights_in(folder, kind, suffix)
    ]
    return found + [f"{name} is missing" for name in (CONFIG, CARD) if name not in sums]


def check_weights(folder: Path) -> list[str]:
    """All files hold one and the same encoder, both full ones the same besides."""
    found = []
    first, of_first = None, ""
    for path in sorted(folder.iterdir()):
        if not WEIGHTS.fullmatch(path.name):
            continue
        state = export.load_network(path).encoder.state_dict()
        first, of_first = first or state, of_first or path.name
        if not same_tensors(first, state):
            found.append(f"{path.name} holds another backbone than {of_first}")
    for kind in ("full", "linear"):
        paths = weights_in(folder, kind, "pth") + weights_in(folder, kind, "safetensors")
        states = [checkpoint.read_checkpoint(path) for path in paths]
        states = [state.get("state_dict", state) for state in states]
        if states and not (len(states) == 2 and same_tensors(*states)):
            found.append(f"{', '.join(path.name for path in paths)}: not the same tensors in both")
    args = read_json(folder / ARGS) if (folder / ARGS).is_file() else {}
    args.pop("provenance", None)
    for suffix in ("pth", "safetensors"):
        path = weights_of(folder, "full", suffix)
        if checkpoint.saved_args(checkpoint.read_checkpoint(path)) != args:
            found.append(f"{ARGS} is not what {path.name} was trained by")
    return found


def check_config(folder: Path) -> list[str]:
    said = read_json(folder / CONFIG)
    network = export.load_network(weights_of(folder, "full", "pth"), keep="none")
    wanted = config_of(folder, network, said["pretrained_cfg"].get("license"))
    found = []
    for where, a, b in (
        ("", said, wanted), ("pretrained_cfg.", said["pretrained_cfg"], wanted["pretrained_cfg"]),
    ):  # fmt: skip
        for name in sorted({*a, *b} - {"pretrained_cfg"}):
            if a.get(name) != b.get(name):
                found.append(
                    f"{CONFIG}: {where}{name} is {a.get(name)!r}, the weights say {b.get(name)!r}"
                )
    return found


def check_lincls(folder: Path) -> list[str]:
    """The accuracies are those of its log, and the classifier is in the release."""
    result, log = folder / LINCLS / LINCLS_RESULT, folder / LINCLS / LOG
    if result.is_file() != bool(weights_in(folder, "linear", "pth")):
        return [f"{LINCLS}/{result.name} and the file with the classifier belong together"]
    if not (result.is_file() and log.is_file()):
        return []
    epochs = {line["epoch"]: line for line in read_log(log) if line.get("kind") == "val"}
    found, said = [], read_json(result)
    args = read_json(folder / LINCLS / ARGS) if (folder / LINCLS / ARGS).is_file() else {}
    of = {**said.get("protocol", {}), "labels": said.get("labels", {}).get("of")}
    of |= {way: said.get("evaluation") == way for way in ("finetune", "cached")}
    found += [
        f"{LINCLS}/{result.name}: {name} is {value!r}, {LINCLS}/{ARGS} says {args[name]!r}"
        for name, value in of.items()
        if name in args and args[name] != value
    ]
    for which in ("last", "best"):
        if which in said and epochs:
            logged = epochs.get(said[which]["epoch"], {})
            for top in ("top1", "top5"):
                if logged.get(top) != said[which][top]:
                    found.append(
                        f"{LINCLS}/{result.name}: {which} {top} is {said[which][top]}, the log "
                        f"says {logged.get(top)}"
                    )
    return found


def check_card(folder: Path) -> list[str]:
    """Every row of its tables is what the logs say, none is left out; files and licence exist."""
    text = (folder / CARD).read_text(encoding="utf-8")
    wanted = dict(row for rows in figures(folder).values() for row in rows)
    said: dict[str, str] = {}
    found = []
    for line in text.splitlines():
        row = re.fullmatch(r"\| (.+?) \| (.+) \|", line.strip())
        if row is None:
            if line.lstrip().startswith("|") and line.strip() not in ("| | |", "|---|---|"):
                found.append(f"{CARD} has a row of another form: {line.strip()}")
            continue
        label, value = row[1], row[2]
        if label not in wanted or label in said:
            found.append(f"{CARD} says {label!r} is {value!r}, which no log says")
        elif value != wanted[label]:
            found.append(f"{CARD} says {label!r} is {value!r}, the logs say {wanted[label]!r}")
        said[label] = value
    found += [f"{CARD} lacks the row {label!r}" for label in wanted if label not in said]
    for match in WEIGHTS.finditer(text):
        if not (folder / match[0]).is_file():
            found.append(f"{CARD} names {match[0]}, which is not there")
    licence = read_json(folder / CONFIG)["pretrained_cfg"].get("license")
    if licence_section(licence).strip() not in text:
        found.append(f"{CARD} does not say of the licence what {CONFIG} does ({licence})")
    return found


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def listed(folder: Path) -> list[str]:
    """The files of a release in order, relative to it: all but the sums and what begins with a dot
    at the top, which git and download tools leave there."""
    paths = [p.relative_to(folder) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
    names = sorted(path.as_posix() for path in paths if not path.parts[0].startswith("."))
    return [name for name in names if name != SUMS]


def read_sums(folder: Path) -> dict[str, str]:
    """{path: SHA-256} of SHA256SUMS.

    Raises:
        ValueError: a line of another form, or a path that leads out of the folder.
    """
    sums = {}
    for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        path = PurePosixPath(match[2]) if match else None
        if path is None or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{SUMS} has a line that is no sum of a file in it: {line[:100]!r}")
        sums[str(path)] = match[1]
    return sums


def weights_in(folder: Path, kind: str, suffix: str) -> list[Path]:
    return [
        path
        for path in sorted(folder.glob(f"*.{suffix}"))
        if (match := WEIGHTS.fullmatch(path.name)) and match[2] == kind
    ]


def weights_of(folder: Path, kind: str, suffix: str) -> Path:
    paths = weights_in(folder, kind, suffix)
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} files NAME-{kind}-HASH.{suffix}, expected one")
    return paths[0]


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_json(path: Path) -> dict:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return said


def read_log(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON lines: {error}") from None


if __name__ == "__main__":
    main()
