"""Make a release of a pretraining checkpoint: weights, config, logs, model card, sums.

A release is a folder with NAME-backbone-HASH and NAME-full-HASH (both encoders with their heads and
the queue; no optimizer), after a linear evaluation also NAME-linear-HASH, each as .pth and
.safetensors, or on request NAME-backbone-HASH.safetensors alone; config.json; arguments, logs and
results; the model card README.md; and SHA256SUMS.
HASH is the first 8 hex digits of the file's SHA-256, which torch.hub checks.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moco.checkpoint import (
    FORMAT_VERSION,
    read_checkpoint,
    same_tensors,
    saved_args,
    write_checkpoint,
    write_safetensors,
    write_torch,
)
from moco.errors import CheckpointError
from moco.publish import export
from moco.publish import release_files as files
from moco.publish.card import check_packages, config_and_card
from moco.publish.verify import verify_release
from moco.run_files import (
    ARGS,
    LINCLS_LATEST,
    LINCLS_RESULT,
    LOG,
    folder_beside,
    read_log,
    sha256,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to release: files of a run, and where to."""

    checkpoint: str | None  # of pretraining, in its run folder
    out: str | None  # the folder to make
    name: str | None = None  # of the files with weights; None: that of `out`
    licence: str | None = None  # of the weights; None: the card says that none is stated
    lincls: str | None = None  # checkpoint or result of a linear evaluation, in its run folder
    metrics: str | None = None  # what measure_align_uniform.py --out wrote for `checkpoint`
    encoder_only: bool = False  # of the weights only the encoder, as .safetensors

    def check(self) -> tuple[Path, str]:
        """The absolute path of the release and its name.

        Raises:
            ValueError: a file is missing, `out` exists or has no parent folder, or name or licence
                are no identifiers. Nothing was loaded yet.
        """
        if self.checkpoint is None or self.out is None:
            raise ValueError("give CHECKPOINT and OUT, or --verify FOLDER")
        for flag in ("checkpoint", "lincls", "metrics"):
            file = getattr(self, flag)
            if file is not None and not Path(file).is_file():
                raise ValueError(f"{flag}: no such file: {file}")
        path = Path(self.out).resolve()
        if not path.parent.is_dir():
            raise ValueError(f"no such folder: {path.parent}")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"{path} exists and is not an empty folder; choose another OUT")
        # No dot: torch.hub takes what is between the first "-" and "." that fit for the hash.
        default = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name)
        name = default if self.name is None else self.name
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
            raise ValueError(f"--name must be letters, digits, - and _, got {name!r}")
        if self.licence is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", self.licence):
            raise ValueError(
                f"--licence must be an identifier such as cc-by-nc-4.0, got {self.licence!r}"
            )
        return path, name


def make_release(request: Request) -> dict[str, Path]:
    """Make a release whole or not at all: it is built elsewhere, verified, and then renamed.

    Returns:
        {name within the release: path} of its files, without SHA256SUMS.

    Raises:
        ValueError: see `Request.check`.
        CheckpointError, DataError, OSError: nothing was written.
    """
    check_packages()
    target, name = request.check()
    source = Path(request.checkpoint)
    with folder_beside(target) as inside:
        folder = inside / target.name
        folder.mkdir()
        network = _write_pretrained(folder, name, source, request.encoder_only)
        if request.lincls:
            _write_lincls(folder, name, Path(request.lincls), network, request.encoder_only)
        if request.metrics:
            _write_metrics(folder, Path(request.metrics), source.name)
        config, card = config_and_card(folder, request.licence)
        write_json(folder / files.CONFIG, config)
        (folder / files.CARD).write_text(card, encoding="utf-8")
        sums = "".join(f"{sha256(folder / path)}  {path}\n" for path in files.listed(folder))
        (folder / files.SUMS).write_text(sums, encoding="utf-8")
        problems = verify_release(folder)
        if problems:
            raise CheckpointError(f"nothing was released: {'; '.join(problems)}")
        folder.replace(target)
    return {path: target / path for path in files.listed(target)}


def _write_pretrained(
    folder: Path, name: str, source: Path, encoder_only: bool
) -> export.LoadedEncoder:
    """NAME-backbone and NAME-full of a checkpoint, its arguments, and what its run folder says."""
    content = read_checkpoint(source)
    network = export.load_with_head(source, keep="none")
    if network.info["layout"] != "moco":
        raise CheckpointError(
            f"{source} is no pretraining checkpoint (layout: {network.info['layout']}), "
            "which holds both encoders; scripts/convert.py converts a single encoder"
        )
    metadata = network.metadata()
    step = {"step": content["step"]} if "step" in content else {}
    if encoder_only:
        _write_weights(folder, f"{name}-backbone", network.state(), step | metadata, _ONE)
    else:
        _write_weights(folder, f"{name}-backbone", network.state(), metadata)
        named = content.get("state_dict", content)  # safetensors of others hold nothing else
        state = {key: tensor for key, tensor in named.items() if isinstance(tensor, Tensor)}
        _write_weights(folder, f"{name}-full", state, step | metadata, in_checkpoint=True)
    if metadata.get("args"):  # else it is not of this project
        _write_run(folder, source, metadata["args"], content.get("step"))
    return network


_ONE, _BOTH = (".safetensors",), (".pth", ".safetensors")


def _write_weights(
    folder: Path,
    name: str,
    state: dict,
    metadata: dict,
    suffixes: Sequence[str] = _BOTH,
    *,
    in_checkpoint: bool = False,
) -> None:
    """Write NAME-HASH.safetensors and NAME-HASH.pth; the latter is a state dict, or a checkpoint
    with the metadata and a checksum."""
    for suffix in suffixes:
        path = folder / f"{name}{suffix}"
        if suffix == ".safetensors":
            write_safetensors(path, state, metadata)
        elif in_checkpoint:
            write_checkpoint(path, {"version": FORMAT_VERSION, **metadata, "state_dict": state})
        else:
            write_torch(path, state)
        path.rename(folder / f"{name}-{sha256(path)[:8]}{suffix}")


def _write_run(folder: Path, source: Path, args: dict, step: int | None) -> None:
    """The checkpoint's arguments; from the run folder around it, if it is of the same run, the log
    up to the checkpoint and the versions of the code."""
    run_args = files.read_json(source.with_name(ARGS), or_empty=True)
    if run_args and all(run_args.get(key) == args.get(key) for key in _SAME_RUN):
        if "provenance" in run_args:
            args = {**args, "provenance": export.strip_local_paths(run_args)["provenance"]}
        _copy_log(source.with_name(LOG), folder / LOG, run_args, last_step=step)
    write_json(folder / ARGS, args)


_SAME_RUN = ("arch", "objective", "seed")


def _copy_log(source: Path, out: Path, args: dict, *, last_step: int | None = None) -> None:
    """The lines of a log up to `last_step`, if there is one, without local paths."""
    if not source.is_file():
        return
    kept = [
        json.dumps(export.strip_local_paths(line, args)) + "\n"
        for line in read_log(source)[0]
        if last_step is None or line["step"] <= last_step
    ]
    out.write_text("".join(kept), encoding="utf-8")


def _write_lincls(
    folder: Path, name: str, source: Path, pretrained: export.LoadedEncoder, encoder_only: bool
) -> None:
    """The classifier (unless `encoder_only`), arguments, log and result of a linear evaluation of
    this very encoder.

    Raises:
        CheckpointError: it is of another encoder or of fine-tuning, or its result is not beside it.
    """
    if source.name == LINCLS_RESULT:  # the result stands for its run
        source = source.with_name(LINCLS_LATEST)
    for path in (source.with_name(LINCLS_RESULT), source):
        if not path.is_file():
            raise CheckpointError(f"--lincls {source}: there is no {path.name} beside it")
    result = files.read_json(source.with_name(LINCLS_RESULT))
    if result.get("evaluation") == "finetune":
        raise CheckpointError(
            f"--lincls {source} is of fine-tuning, which has changed the encoder: its accuracy is "
            "none of this one; give a linear evaluation (main_lincls.py without --finetune)"
        )
    if not {"best", "last"} <= result.keys():
        raise CheckpointError(
            f"--lincls {source}: {LINCLS_RESULT} beside it has no best and last accuracy, as a "
            "training of main_lincls.py leaves them there"
        )
    network = export.load_with_head(source)
    if not network.classes:
        raise CheckpointError(f"--lincls {source} holds no linear classifier")
    if not same_tensors(network.encoder.state_dict(), pretrained.encoder.state_dict()):
        raise CheckpointError(
            f"--lincls {source} is not a probe of this encoder: its backbone has other weights "
            "(another checkpoint, or fine-tuned)"
        )
    content = read_checkpoint(source)
    if not encoder_only:
        metadata = {**network.metadata(), "classifier_epoch": content.get("epoch", 0) - 1}
        _write_weights(folder, f"{name}-linear", network.state(), metadata)
    (folder / files.PROBE).parent.mkdir()
    args = saved_args(content)
    write_json(folder / files.PROBE, export.strip_local_paths(result, args))
    if source.with_name(ARGS).is_file():
        run_args = files.read_json(source.with_name(ARGS))
        write_json(folder / files.PROBE_ARGS, export.strip_local_paths(run_args))
    _copy_log(source.with_name(LOG), folder / files.PROBE_LOG, args)


def _write_metrics(folder: Path, source: Path, name: str) -> None:
    metrics = files.read_json(source)
    numbers = ("alignment", "uniformity", "alpha", "t", "images")
    is_whole = all(isinstance(metrics.get(key), (int, float)) for key in numbers)
    if not is_whole or "layer" not in metrics:
        raise CheckpointError(
            f"--metrics {source} has no alignment and uniformity, as measure_align_uniform.py "
            "--out writes them"
        )
    if Path(str(metrics.get("checkpoint"))).name != name:
        raise CheckpointError(
            f"--metrics {source} is of {metrics.get('checkpoint')}, the release of {name}"
        )
    write_json(folder / files.METRICS, export.strip_local_paths(metrics))
