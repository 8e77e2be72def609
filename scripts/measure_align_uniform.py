#!/usr/bin/env python
"""Alignment, uniformity, k-NN accuracy and rank of an encoder's features on held-out images.

    python scripts/measure_align_uniform.py RUN/checkpoint_0199.pth.tar DIR [--out FILE.json]
    python scripts/measure_align_uniform.py --timm vit_base_patch16_224 mae_vit_base.pth DIR
    python scripts/measure_align_uniform.py --features VAL.npz [--bank TRAIN.npz]

Images are those of DIR/val, or of DIR itself where there is no val/. Positive pairs are two views
of each by the augmentation that the checkpoint was trained with (MoCo v2's where the file does not
say) under a fixed seed; uniformity, rank and deviation are over the first views, each image once.
k-NN classifies centre crops of DIR/val by those of DIR/train. Features are normalised, and come
from the projection head and from the backbone below it; files without a projection head, and timm's
models, have a backbone only. Lower is better for alignment and uniformity.

A features file has the arrays `features` (N, C) and perhaps `labels` (N,) and `positives` (N, C):
other views of the same images. It is .npz or .safetensors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from align_uniform.bounds import uniformity_infimum  # noqa: E402
from align_uniform.metrics import (  # noqa: E402
    alignment,
    dimension_deviation,
    effective_rank,
    uniformity_curve,
)
from moco import checkpoint, cli, encoders  # noqa: E402
from moco.data import loader  # noqa: E402
from moco.data.images import DATASETS, FolderImages, Images, Subset, first_per_class, open_images
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform, normalize, pretrain_recipe  # noqa: E402
from moco.errors import CheckpointError, DataError  # noqa: E402
from moco.evaluate import knn as evaluate  # noqa: E402
from moco.launch import usable_cores, visible_devices  # noqa: E402
from moco.progress import progress  # noqa: E402
from moco.run_files import write_json  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", type=cli.non_empty)
    parser.add_argument("data", metavar="DIR", nargs="?", type=cli.non_empty)
    parser.add_argument("--timm", metavar="NAME", help="CHECKPOINT has weights of this timm model")
    parser.add_argument("--features", type=Path, metavar="FILE", help="measure these instead")
    parser.add_argument("--bank", type=Path, metavar="FILE", help="with --features: for k-NN")
    parser.add_argument("--dataset", choices=DATASETS, default="folder")
    parser.add_argument(
        "--images-per-class", type=count, metavar="N", help="the first N of each class"
    )
    parser.add_argument(
        "--most-images", type=count, default=100_000, metavar="N",
        help="of larger sets take N, evenly spread: bounds memory and time (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layer", choices=("projection", "backbone"), help="only this one (both, where there are)"
    )
    parser.add_argument(
        "--alpha", type=positives, default=[1.0, 2.0], metavar="A,B", help="of alignment (1,2)"
    )
    parser.add_argument(
        "--t", type=positives, default=[float(t) for t in range(1, 9)], metavar="A,B",
        help="of uniformity (1,2,...,8)",
    )  # fmt: skip
    parser.add_argument("--knn-k", type=count, default=200, metavar="K")
    parser.add_argument("--knn-t", type=positive, default=0.07, metavar="T", help="temperature")
    parser.add_argument("--image-size", type=count, metavar="PX", help="default: the checkpoint's")
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"))
    parser.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    parser.add_argument("--seed", type=int, default=0, help="of the views (%(default)s)")
    parser.add_argument("--batch-size", type=count, default=256)
    parser.add_argument("-j", "--workers", type=int, default=usable_cores())
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return parser


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive finite number, got {text}")
    return value


def positives(text: str) -> list[float]:
    """ "1,2,3", each once, in ascending order."""
    return sorted({positive(part) for part in text.split(",")})


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    try:
        device = visible_devices(args.device, None)[0]
    except ValueError as error:
        parser.error(str(error))
    with cli.report_user_errors():
        result = measure_file(args, device) if args.features else measure_encoder(args, device)
        print(json.dumps(result) if args.json else table(result))
        if args.out:
            write_json(args.out, result)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.features:
        if args.checkpoint or args.timm or args.layer:
            parser.error("--features takes the place of CHECKPOINT and DIR; give one or the other")
    elif args.data is None:
        parser.error("CHECKPOINT and DIR are needed, or --features FILE")
    elif not Path(args.data).is_dir():
        parser.error(f"no such data folder: {args.data}")
    if args.bank and not args.features:
        parser.error("--bank is for --features; with a CHECKPOINT the bank is DIR/train")
    if args.timm and args.layer == "projection":
        parser.error("timm's models have no projection head; leave --layer projection out")
    if args.seed < 0 or args.workers < 0:
        parser.error("--seed and --workers must not be negative")
    if args.out and not args.out.parent.is_dir():
        parser.error(f"no such folder for --out: {args.out.parent}")
    if args.mean or args.std:
        try:
            cli.check_image_statistics(args.mean or IMAGENET_MEAN, args.std or IMAGENET_STD)
        except ValueError as error:
            parser.error(str(error))


# ------------------------------------------------------------------------------------------------
# Encoders
# ------------------------------------------------------------------------------------------------


@dataclass
class Network:
    """An encoder in eval mode, what it takes and what it is."""

    module: nn.Module
    head: nn.Module | None  # the projection head at its end, None where there is none
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    trained: dict  # the arguments that it was trained with, as far as they are known
    facts: dict  # for the report
    notes: list[str] = field(default_factory=list)

    @torch.no_grad()
    def features(self, images: Tensor, device: torch.device) -> dict[str, Tensor]:
        """uint8 images -> unit rows of each layer, on the CPU."""
        layers: dict[str, Tensor] = {}

        def keep_input(_: nn.Module, inputs: tuple[Tensor]) -> None:
            layers["backbone"] = inputs[0]

        hook = self.head.register_forward_pre_hook(keep_input) if self.head else None
        try:
            out = self.module(normalize(images.to(device), self.mean, self.std))
        finally:
            if hook:
                hook.remove()
        layers["projection" if self.head else "backbone"] = out
        return {name: F.normalize(rows.float(), dim=1).cpu() for name, rows in layers.items()}


def load(args: argparse.Namespace) -> Network:
    network = load_timm(args.timm, args.checkpoint) if args.timm else load_checkpoint(args)
    network.image_size = args.image_size or network.image_size
    network.mean, network.std = args.mean or network.mean, args.std or network.std
    try:
        encoders.check_image_size(network.module, network.image_size)
    except ValueError as error:
        raise CheckpointError(f"{args.checkpoint}: {error}; give another --image-size") from error
    return network


def load_checkpoint(args: argparse.Namespace) -> Network:
    notes = []
    try:
        module, info = checkpoint.load_encoder(args.checkpoint, head="projection")
        head = encoders.get_head(module)
    except CheckpointError:
        if args.layer == "projection":
            raise
        module, info = checkpoint.load_encoder(args.checkpoint)  # raises what is not of the head
        head = None
        notes.append(f"no projection head in {args.checkpoint}: the backbone alone is measured")
    trained = info["args"]
    return Network(
        module=module,
        head=head,
        image_size=trained.get("image_size", 224),
        mean=trained.get("mean", IMAGENET_MEAN),
        std=trained.get("std", IMAGENET_STD),
        trained=trained,
        facts={name: info[name] for name in ("arch", "epoch", "objective")},
        notes=notes,
    )


def load_timm(name: str, path: str) -> Network:
    """A timm model without its classifier, all of its weights from a file; nothing is downloaded.

    Raises:
        CheckpointError: no timm, no such model, or weights that are missing or of another shape.
    """
    try:
        import timm
    except ImportError:
        raise CheckpointError("--timm needs the package timm: pip install timm") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:3])
        raise CheckpointError(f"timm has no model {name!r}{f'; there is {near}' if near else ''}")
    module = timm.create_model(name, pretrained=False, num_classes=0).eval()
    state = timm_state(checkpoint.read_checkpoint(path))
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    shapes = {
        key: (tuple(state[key].shape), tuple(tensor.shape))
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    }
    if missing or shapes:
        key = next(iter(shapes or missing))
        got, expected = shapes[key] if shapes else ("nothing", tuple(wanted[key].shape))
        raise CheckpointError(
            f"{path} does not fit timm's {name}: {len(missing)} tensors missing and {len(shapes)} "
            f"of another shape, first {key}: {got}, expected {expected}; give the model's own name"
        )
    module.load_state_dict({key: state[key] for key in wanted})
    config = timm.data.resolve_model_data_config(module)
    notes = []
    left = [key for key in state if key not in wanted]
    if left:
        notes.append(f"{len(left)} tensors of the file have no place in the encoder: {_few(left)}")
    return Network(
        module=module,
        head=None,
        image_size=config["input_size"][-1],
        mean=config["mean"],
        std=config["std"],
        trained={},
        facts={"arch": f"timm {name}", "epoch": None, "objective": None},
        notes=notes,
    )


def timm_state(content: dict) -> dict[str, Tensor]:
    """The tensors in a checkpoint of timm or MAE: an average of the weights where there is one."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    state = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            state[str(key).removeprefix("_orig_mod.").removeprefix("module.")] = value
    return state


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def held_out(args: argparse.Namespace) -> Images:
    """DIR/val, or all of DIR where there is no such folder; labels are not needed."""
    root = Path(args.data)
    if args.dataset != "folder":
        return open_images(args.dataset, root, "val")
    return FolderImages(root / "val" if (root / "val").is_dir() else root)


def knn_images(args: argparse.Namespace) -> tuple[Images, Images]:
    """Bank and queries, of the same classes."""
    root = Path(args.data)
    bank = open_images(args.dataset, root, "train")
    return bank, open_images(args.dataset, root, "val", classes=bank.classes)


def limited(images: Images, args: argparse.Namespace) -> Images:
    if args.images_per_class is not None:
        if images.targets is None:
            raise DataError(f"--images-per-class needs labels, and {args.data} has none")
        kept = first_per_class(images.targets, args.images_per_class)
        images = Subset(images, kept)
    if len(images) > args.most_images:
        spread = [i * len(images) // args.most_images for i in range(args.most_images)]
        images = Subset(images, spread)
    return images


def extract_pairs(
    network: Network, images: Images, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Unit rows of two views of each image, by layer."""
    transform = pretrain_recipe(
        network.image_size,
        aug_plus=network.trained.get("aug_plus", True),
        crop_scale=network.trained.get("crop_scale", (0.2, 1.0)),
        blur=network.trained.get("blur", True),
    )
    views = loader.AugmentedViews(images, transform, seed=args.seed, num_views=2)
    batches = torch.utils.data.DataLoader(
        views,
        batch_size=args.batch_size,
        sampler=[(0, index) for index in range(len(images))],
        num_workers=args.workers,
    )
    first, second = [], []
    for view_1, view_2, *_ in progress(batches, "views"):
        first.append(network.features(view_1, device))
        second.append(network.features(view_2, device))
    return joined(first), joined(second)


def extract_plain(
    network: Network,
    images: Images,
    args: argparse.Namespace,
    device: torch.device,
    what: str,
) -> tuple[dict[str, Tensor], Tensor]:
    """Unit rows of the centre crops, by layer, and their labels."""
    dataset = loader.PlainImages(images, eval_transform(network.image_size))
    batches = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, num_workers=args.workers
    )
    rows, labels = [], []
    for pixels, targets in progress(batches, what):
        rows.append(network.features(pixels, device))
        labels.append(targets)
    return joined(rows), torch.cat(labels)


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


def measure_encoder(args: argparse.Namespace, device: torch.device) -> dict:
    images = limited(held_out(args), args)
    if len(images) < 2:
        raise DataError(f"{args.data} has {len(images)} image to measure; at least 2 are needed")
    network = load(args)
    network.module.to(device)
    notes = network.notes
    if args.dataset == "folder" and not (Path(args.data) / "val").is_dir():
        notes.append(f"no folder {Path(args.data) / 'val'}: measured on all images of {args.data}")
    if "aug_plus" not in network.trained:
        notes.append("the file names no augmentation: views are MoCo v2's")
    x, y = extract_pairs(network, images, args, device)

    bank = queries = None
    try:
        bank_images, query_images = (limited(part, args) for part in knn_images(args))
    except DataError as error:
        notes.append(f"k-NN left out: {error}")
    else:
        bank, bank_labels = extract_plain(network, bank_images, args, device, "bank")
        queries, labels = extract_plain(network, query_images, args, device, "queries")

    layers = {}
    for name in ("projection", "backbone") if args.layer is None else (args.layer,):
        if name in x:
            layers[name] = measure(x[name], y[name], args, device, f"{args.checkpoint}, {name}")
            layers[name]["knn"] = bank and knn(
                queries[name], labels, bank[name], bank_labels, args, device
            )
    facts = {"checkpoint": args.checkpoint, **network.facts, "data": args.data}
    return report(facts, layers, len(images), args, notes)


def measure_file(args: argparse.Namespace, device: torch.device) -> dict:
    """The same of features that are there already."""
    notes: list[str] = []
    x, y, labels = read_features(args.features, notes)
    result = measure(x, y, args, device, str(args.features))
    result["knn"] = None
    if y is None:
        notes.append(f"alignment left out: {args.features} has no positives (other views)")
    if args.bank is None:
        notes.append("k-NN left out: give a bank with labels by --bank FILE")
    else:
        bank, _, bank_labels = read_features(args.bank, notes)
        unlabelled = [
            str(path)
            for path, found in ((args.features, labels), (args.bank, bank_labels))
            if found is None
        ]
        if bank.shape[1] != x.shape[1]:
            raise DataError(
                f"{args.bank} has features of {bank.shape[1]} dimensions, {args.features} of "
                f"{x.shape[1]}; take both from one layer of one encoder"
            )
        if unlabelled:
            notes.append(f"k-NN left out: no labels in {' and '.join(unlabelled)}")
        else:
            result["knn"] = knn(x, labels, bank, bank_labels, args, device)
    return report({"features": str(args.features)}, {"features": result}, len(x), args, notes)


def measure(
    x: Tensor, y: Tensor | None, args: argparse.Namespace, device: torch.device, what: str
) -> dict:
    """All that needs no labels. x, y: (N, C) unit rows; without y no alignment."""
    x = x.to(device)
    y = None if y is None else y.to(device)
    dim = x.shape[1]
    try:
        return {
            "dim": dim,
            "alignment": None
            if y is None
            else {f"{alpha:g}": alignment(x, y, alpha) for alpha in args.alpha},
            "uniformity": _by_t(args.t, uniformity_curve(x, args.t)),
            "uniformity_infimum": _by_t(args.t, [uniformity_infimum(dim, t) for t in args.t]),
            "effective_rank": effective_rank(x),
            "deviation": dimension_deviation(x).mean().item() * dim**0.5,
        }
    except ValueError as error:
        raise DataError(f"features of {what} cannot be measured: {error}") from error


def _by_t(ts: list[float], values: list[float]) -> dict[str, float]:
    return {f"{t:g}": value for t, value in zip(ts, values, strict=True)}


def knn(
    queries: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    args: argparse.Namespace,
    device: torch.device,
) -> dict:
    """Weighted k-NN accuracy in percent; labels are any whole numbers."""
    known, bank_classes = bank_labels.unique(return_inverse=True)
    position = torch.searchsorted(known, labels).clamp_(max=len(known) - 1)
    targets = torch.where(known[position] == labels, position, -1)  # -1 is never right
    top = min(5, len(known))
    ranked = evaluate.knn_predict(
        queries.to(device),
        bank.to(device),
        bank_classes.to(device),
        classes=len(known),
        k=args.knn_k,
        temperature=args.knn_t,
    )
    correct = evaluate.count_correct(ranked, targets.to(device), (1, top))
    top1, top5 = (100 * correct / len(labels)).tolist()
    return {
        "top1": top1,
        "top5": top5,
        "k": min(args.knn_k, len(bank)),
        "temperature": args.knn_t,
        "bank": len(bank),
        "queries": len(labels),
    }


def read_features(path: Path, notes: list[str]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """features, positives and labels of a file; rows are normalised, which a note says."""
    arrays = read_arrays(path, ("features", "positives", "features_2", "labels"))
    if "features" not in arrays:
        raise DataError(f"{path} has no array `features`")
    labels = arrays.pop("labels", None)
    for name, rows in arrays.items():
        if rows.ndim != 2 or rows.dtype.kind != "f" or min(rows.shape) < 1:
            raise DataError(
                f"{path}: {name} must be (N, C) floating-point numbers, got {rows.dtype} of shape "
                f"{rows.shape}"
            )
        if not np.isfinite(rows).all():
            row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
            raise DataError(f"{path}: {name} has NaN or infinite values, first in row {row}")
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
        if not lengths.all():
            row = int(np.flatnonzero(lengths == 0)[0])
            raise DataError(f"{path}: row {row} of {name} is zero and has no direction")
        if abs(lengths - 1).max() > 1e-3:
            notes.append(f"{name} of {path} are not unit rows: normalised")
        arrays[name] = rows / lengths[:, None].astype(np.float32)
    features = arrays["features"]
    positives = arrays.get("positives", arrays.get("features_2"))
    if positives is not None and positives.shape != features.shape:
        raise DataError(
            f"{path}: positives must pair up with features row by row, got shapes "
            f"{positives.shape} and {features.shape}"
        )
    if labels is not None:
        if labels.shape != (len(features),) or labels.dtype.kind not in "iu":
            raise DataError(
                f"{path}: labels must be {len(features)} whole numbers, got {labels.dtype} of "
                f"shape {labels.shape}"
            )
        if (labels < 0).any():  # what images without labels are written with
            labels = None
    return (
        torch.from_numpy(features).float(),
        None if positives is None else torch.from_numpy(positives).float(),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz or .safetensors file has; nothing is unpickled."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # numpy's has no bfloat16

            content = load_file(path)
            found = {name: content[name] for name in names if name in content}
            return {
                name: (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
                for name, rows in found.items()
            }
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in names if name in content}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can make the readers fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read as an .npz or .safetensors file of plain arrays: {reason}"
        ) from error


# ------------------------------------------------------------------------------------------------
# Reporting
# ------------------------------------------------------------------------------------------------


def report(
    facts: dict, layers: dict[str, dict], images: int, args: argparse.Namespace, notes: list[str]
) -> dict:
    """The result. Its first lines are the two numbers of the paper, of the first layer, at
    alpha = 2 and t = 2 where these were measured."""
    name, first = next(iter(layers.items()))
    alpha, t = (f"{2 if 2 in given else given[0]:g}" for given in (args.alpha, args.t))
    return {
        **facts,
        "images": images,
        "seed": args.seed,
        "layer": name,
        "alpha": float(alpha),
        "t": float(t),
        "alignment": first["alignment"] and first["alignment"][alpha],
        "uniformity": first["uniformity"][t],
        "uniformity_infimum": first["uniformity_infimum"][t],
        "layers": layers,
        "notes": notes,
    }


def table(result: dict) -> str:
    layers = result["layers"]
    title = [result.get("checkpoint") or result["features"], result.get("arch")]
    title += [f"epoch {result['epoch']}" if result.get("epoch") is not None else None]
    title += [result.get("objective")]
    lines = [", ".join(part for part in title if part)]
    lines.append(f"{result['images']} images")
    if "data" in result:
        lines[-1] += f" of {result['data']}, two views each (seed {result['seed']})"

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"{name:28}" + "".join(f"{cell:>20}" for cell in cells))

    first, *_ = results = list(layers.values())
    lines.append("")
    row("", list(layers))
    row("dimensions", [str(one["dim"]) for one in results])
    for alpha in first["alignment"] or ():
        row(f"alignment, alpha {alpha}", [f"{one['alignment'][alpha]:.4f}" for one in results])
    for t in first["uniformity"]:
        cells = [
            f"{one['uniformity'][t]:.4f} ({one['uniformity_infimum'][t]:.4f})" for one in results
        ]
        row(f"uniformity, t {t} (best)", cells)
    row("effective rank", [f"{one['effective_rank']:.1f}" for one in results])
    row("deviation * sqrt(dim)", [f"{one['deviation']:.4f}" for one in results])
    if first["knn"]:
        used = first["knn"]
        for name in ("top1", "top5"):
            row(f"k-NN {name}, k {used['k']}", [f"{one['knn'][name]:.2f} %" for one in results])
        lines.append(f"k-NN: {used['queries']} queries, bank of {used['bank']}")
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


if __name__ == "__main__":
    main()
