"""The command lines of both mains: flags made from the config's fields, configs made from flags.

Flags are spelled as upstream MoCo spells them. What can be known at parse time is refused here, in
one line with exit status 2. Other commands use the parser and the argument types.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch

from moco import encoders
from moco.checkpoint import is_url, read_checkpoint, run_checkpoints, without_secrets
from moco.config import (
    CHOSEN,
    DATASET_DEFAULTS,
    FINETUNE_DEFAULTS,
    FINETUNE_RATES,
    IN_BATCH_DEFAULTS,
    PROBE_DEFAULTS,
    STL10_DEFAULTS,
    Data,
    Folder,
    InBatchConfig,
    LinclsConfig,
    Part,
    PretrainConfig,
    SentenceConfig,
    auto_rate,
    from_flat,
    help_of,
    objective_slug,
    parts_of,
    small_preset,
)
from moco.data.folders import LeftOut, image_paths, split_folder
from moco.data.images import open_images, typical_side
from moco.data.shards import SUFFIXES, shard_paths
from moco.errors import CheckpointError, DataError
from moco.launch import place, usable_cores
from moco.packages import import_optional
from moco.precision import channels_last_helps
from moco.printable import printable
from moco.run_files import (
    ARGS,
    DEPTH_RESULT,
    DEPTH_STATE,
    FAILED_STATE,
    LINCLS_LATEST,
    LINCLS_RESULT,
    weights_file,
)

# ------------------------------------------------------------------------------------------------
# Parser and types of arguments
# ------------------------------------------------------------------------------------------------

Config = TypeVar("Config", PretrainConfig, InBatchConfig)

# Flags that take a list of whole numbers, as `--gpus 0 1 2 3` or `--gpus 0,1,2,3`.
_LIST_FLAGS = ("--gpus", "--schedule")


class Parser(argparse.ArgumentParser):
    """argparse, except that a list of numbers ends where the numbers end.

    In upstream's own command lines the data folder may follow `--gpus 0 1 2 3` or
    `--schedule 120 160`; argparse would take it for one more number. Errors are one line.
    """

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        try:
            joined = _join_lists(sys.argv[1:] if args is None else args)
        except ValueError as error:
            self.error(str(error))
        parsed, unknown = self.parse_known_args(joined, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        return parsed

    def _suggestion(self, unknown: Sequence[str]) -> str:
        word = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        flags = list(self._option_string_actions)
        longer = [flag for flag in flags if word and flag.startswith(word)]
        near = longer or difflib.get_close_matches(word, flags, n=1)
        return f"; did you mean {near[0]}?" if near else ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists all flags)\n")


def _join_lists(argv: Sequence[str]) -> list[str]:
    joined: list[str] = []
    collecting = False  # the numbers of a list flag, into one word with it
    for word in argv:
        if collecting and re.fullmatch(r"-?\d+(,-?\d+)*", word):
            joined[-1] += ("" if joined[-1].endswith("=") else ",") + word
            collecting = "," not in word  # "0,1" is the whole list
            continue
        if collecting and joined[-1].endswith("=") and not word.startswith("-"):
            raise ValueError(f"{joined[-1][:-1]} expects whole numbers, got {word!r}")
        collecting = word in _LIST_FLAGS
        joined.append(f"{word}=" if collecting else word)
    return joined


def non_empty(text: str) -> str:
    """argparse type of a path: an unset variable of the shell is no path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return text


def folder(text: str) -> Path:
    """argparse type of a run folder."""
    path = Path(non_empty(text))
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file, expected a folder")
    return path


def new_file(text: str) -> Path:
    """argparse type of --out, a file to write: whether it can be is known before work starts."""
    path = Path(non_empty(text))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder for --out: {path.parent}")
    return path


def seed(text: str) -> int:
    """argparse type of a seed, as all generators take it."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"--seed must be at least 0 and below 2^63, got {text}")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """argparse type of a list of whole numbers, "0,1,2"."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, got {text!r}") from None


def rates(text: str) -> tuple[float, ...]:
    """argparse type of one number, or of several with commas: "30" or "1,3,10,30"."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, or several as 1,3,10, got {text!r}"
        ) from None
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"a number is there twice in {text!r}")
    return values


def auto_or_rate(text: str) -> float | None:
    """argparse type of a learning rate; None for "auto"."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def label_source(text: str) -> float | str:
    """argparse type of --labels: percent, or a file."""
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        if Path(non_empty(text)).is_file():
            return text
        raise argparse.ArgumentTypeError(
            f"expected percent, as 1 or 10, or a file that lists images, got {text!r}"
        ) from None
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"expected percent above 0 and up to 100, got {text}")
    return percent


# How text is read where the annotation of a field does not say it.
KINDS: dict[str | None, Callable[[str], Any]] = {
    "path": non_empty,
    "folder": folder,
    "numbers": numbers,
    "rate": float,
    "rates": rates,
    "auto_rate": auto_or_rate,
    "labels": label_source,
}

# ------------------------------------------------------------------------------------------------
# Flags from fields, parts from flags
# ------------------------------------------------------------------------------------------------


def add_options(
    parser: argparse.ArgumentParser, config: type, only: Sequence[str] | None = None
) -> None:
    """Add the flags of all parts of a config, or of some by name, in a group for each part."""
    for name, part in parts_of(config).items():
        if only is not None and name not in only:
            continue
        title, _, description = part.__doc__.partition("\n\n")[0].partition(": ")
        hints, helps = get_type_hints(part), help_of(part)
        group = parser.add_argument_group(title.strip(), " ".join(description.split()) or None)
        for field in dataclasses.fields(part):
            if field.metadata["flags"]:
                _add_option(group, field, hints[field.name], helps.get(field.name))


def _add_option(
    group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any, help: str | None
) -> None:
    flags, given = field.metadata["flags"], dict(field.metadata["parse"])
    given["help"] = help
    if flags[0].startswith("-"):
        given |= {"dest": field.name, "default": None if field.metadata["unset"] else field.default}
    kind = get_args(hint)[0] if isinstance(hint, UnionType) else hint
    if kind is bool and field.default is None:
        given["action"] = argparse.BooleanOptionalAction
    elif kind is bool:
        given["action"] = "store_false" if field.default else "store_true"
    elif field.metadata["kind"] is not None:
        given["type"] = KINDS[field.metadata["kind"]]
    elif get_origin(kind) is tuple:
        given |= {"type": float, "nargs": len(get_args(kind))}
    else:
        given["type"] = kind
    if given.get("type") in (int, float) and "nargs" not in given:
        given.setdefault("metavar", "N" if kind is int else "X")
    group.add_argument(*flags, **given)


def make_parts(
    options: argparse.Namespace, config: type, only: Sequence[str] | None = None
) -> dict[str, Part]:
    """The parts of a config, or some of them by name, from parsed options.

    Raises:
        ValueError: a part refuses its values.
    """
    parts = {}
    for name, part in parts_of(config).items():
        if only is not None and name not in only:
            continue
        values = {
            field.name: _frozen(getattr(options, field.name))
            for field in dataclasses.fields(part)
            if field.metadata["flags"]
        }
        if values:
            make = getattr(part, "from_options", None)
            parts[name] = make(values) if make else part(**values)
    return parts


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _settle(parts: dict[str, Part]) -> dict[str, Part]:
    """What both mains work out: devices and processes, loader processes of each, the seed."""
    placement = place(parts["launch"])
    workers = parts["data"].workers
    workers = usable_cores() if workers is None else workers
    # -j counts per node, as upstream; each process gets its share, rounded up.
    workers = -(-workers // placement.local_processes)
    seed = parts["optim"].seed
    seeding = {"seed": secrets.randbelow(2**31) if seed is None else seed}
    return {
        **parts,
        "placement": placement,
        "data": replace(parts["data"], workers=workers),
        "optim": replace(parts["optim"], **seeding, seed_given=seed is not None),
    }


@contextlib.contextmanager
def _refusals(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Report a value that does not fit as argparse does."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


# ------------------------------------------------------------------------------------------------
# main_moco.py
# ------------------------------------------------------------------------------------------------


def pretrain_parser() -> argparse.ArgumentParser:
    parser = Parser(description="MoCo pretraining with alignment + uniformity", allow_abbrev=False)
    add_options(parser, PretrainConfig)
    return parser


def pretrain_config(argv: Sequence[str] | None = None) -> PretrainConfig:
    """The config that a command line of main_moco.py describes; else exit status 2."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--replay" for word in words):
        return replay_config(words, PretrainConfig)
    parser = pretrain_parser()
    options = parser.parse_args(argv)
    chosen = ""
    if options.preset:
        options, chosen = _with_preset(parser, options, argv)
    with _refusals(parser):
        parts = make_parts(options, PretrainConfig)
        parts["preset"] = replace(parts["preset"], chosen=chosen)
        config = PretrainConfig(**_settle(parts))
        config = _checked(config, config.encoder.moco_dim)
    check_data_folder(parser, config.data, {"pretrain": config.optim.batch_size})
    encoder = config.encoder
    name = f"moco-{encoder.arch}-{objective_slug(config.objective)}-k{encoder.moco_k}"
    return replace(config, saving=_pretrain_folder(parser, config, name))


def _with_preset(
    parser: argparse.ArgumentParser, options: argparse.Namespace, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, str]:
    """Options with the values of --preset where flags are not given, and what they are."""
    unset = {name: parser.get_default(name) for name in (*CHOSEN, "bn_splits")}
    parser.set_defaults(**dict.fromkeys(unset))
    bare = vars(parser.parse_args(argv))
    given = {name: bare[name] for name in unset if bare[name] is not None}
    with _refusals(parser):
        data = make_parts(options, PretrainConfig, only=["data"])["data"]
        check_data_folder(parser, data, {"pretrain": 1})
        try:
            images = open_images(
                data.dataset, data.data, "pretrain", per_class=data.images_per_class, quiet=True
            )
            side = typical_side(images)
        except DataError as error:
            parser.error(str(error))
        values, why = small_preset(len(images), side, given)
    parser.set_defaults(**{**unset, **values})
    options = parser.parse_args(argv)
    flags = {name: _as_flag(parser, name, getattr(options, name)) for name in CHOSEN}
    chosen = " ".join(flag for name, flag in flags.items() if flag and name not in given)
    mine = " ".join(flags[name] for name in flags if name in given) or "none of them"
    return options, f"{options.preset}, which chose {chosen} ({why}); given: {mine}"


def _as_flag(parser: argparse.ArgumentParser, name: str, value: Any) -> str:
    """An option as a command line gives it, "" where it needs no word."""
    action = next(action for action in parser._actions if action.dest == name)
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        return flag if value == action.const else ""
    return f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}"


def replay_config(argv: Sequence[str], config_type: type) -> Any:
    """The config of the run that a black box is of, to rerun one step of it here.

    Args:
        config_type: of the run's task; with the parts data, optim, saving, launch and placement.
    """
    parser = Parser(description="rerun the step that a run's black box holds", allow_abbrev=False)
    parser.add_argument("--replay", required=True, type=folder, metavar="RUN/failed")
    parser.add_argument("data", nargs="?", type=non_empty, metavar="DIR", help="if it has moved")
    parser.add_argument("-j", "--workers", type=int, default=0, metavar="N")
    add_options(parser, config_type, only=["launch"])
    options = parser.parse_args(argv)
    state = options.replay / FAILED_STATE
    try:
        saved = read_checkpoint(state)
        about, flat = saved["failed"], saved["args"]
    except (FileNotFoundError, CheckpointError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        parser.error(
            f"--replay: expected RUN/failed, which a run leaves when a step fails: {reason}"
        )
    flat = {**flat, **_REPLAYED, "workers": options.workers, "seed_given": True}
    flat |= {"data": options.data or flat["data"], "replay": str(options.replay)}
    flat |= {"checkpoint": str(state), "max_steps": about["step"] + 1}
    flat["save_dir"] = f"{tempfile.gettempdir()}/replay-{secrets.token_hex(4)}"
    with _refusals(parser):
        launch = make_parts(options, config_type, only=["launch"])["launch"]
        parts = {name: from_flat(part, flat) for name, part in parts_of(config_type).items()}
        placement = place(launch)
        config = config_type(**{**parts, "launch": launch, "placement": placement})
    check_data_folder(parser, config.data, {"pretrain": config.optim.batch_size})
    return config


# What a replay does without, whatever the run did.
_REPLAYED = {"resume": None, "init_from": None, "knn_every": 0, "profile": False, "compile": False}


def _checked(config: Config, outputs: int) -> Config:
    """The config of a training, its memory format settled.

    Raises:
        ValueError: an unknown arch, a stem or image size that does not fit it, no compiler.
    """
    arch, size = config.encoder, config.views.image_size
    encoder = encoders.build_encoder(
        arch.arch, outputs, image_size=size, small_stem=arch.small_stem
    )
    encoders.check_image_size(encoder, size)
    device = torch.device(config.placement.devices[0])
    if config.speed.channels_last is None:
        helps = channels_last_helps(device, config.optim.amp)
        config = replace(config, speed=replace(config.speed, channels_last=helps))
    if config.speed.compile:
        _check_compiler(device)
    return config


def _check_compiler(device: torch.device) -> None:
    """torch.compile makes C++ code for a CPU, and on a GPU Triton compiles its launcher in C."""
    if device.type == "cpu":
        usual = ["clang++" if sys.platform == "darwin" else "g++"]
        variable, language = "CXX", "C++"
    else:
        usual, variable, language = ["gcc", "clang", "cc"], "CC", "C"
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"--compile needs a {language} compiler, and {' or '.join(names)} is not on the PATH; "
            f"install one, name it in the environment variable {variable}, or leave out --compile"
        )


def _pretrain_folder(parser: argparse.ArgumentParser, config: Any, name: str) -> Folder:
    """The run folder, `name`, batch size and the time where none is given, and the checkpoint to go
    on from: a path, "auto" or None."""
    saving, init_from = config.saving, config.optim.init_from
    check_run_folder(parser, saving.save_dir, saving.resume, "pretraining")
    resume, run = saving.resume, saving.save_dir
    checkpoint = resume
    if resume == "auto":
        checkpoint = "auto" if run_checkpoints(run) else None
    elif resume and Path(resume).is_dir():
        parser.error(
            f"--resume: {resume} is a folder, expected a checkpoint; to go on from its newest one "
            f"give --save-dir {resume} --resume auto"
        )
    elif resume and not Path(resume).is_file():
        parser.error(f"--resume: no such checkpoint: {resume}")
    elif resume and run:
        own = [path.resolve() for path in run_checkpoints(run)]
        if Path(resume).resolve() in own[:-1]:
            parser.error(
                f"{run} holds a later checkpoint than {resume} ({own[-1].name}); go "
                "back in another --save-dir, or move the later ones away"
            )
    if init_from and resume not in (None, "auto"):
        parser.error("--init-from starts a run and --resume goes on with one: give one of them")
    if init_from and checkpoint is None and not Path(init_from).is_file():
        parser.error(f"--init-from: no such checkpoint: {init_from}")
    if run is None:
        run = _new_folder(f"{name}-b{config.optim.batch_size}", config.optim.seed)
    return replace(saving, save_dir=run, checkpoint=checkpoint)


# ------------------------------------------------------------------------------------------------
# train_in_batch.py
# ------------------------------------------------------------------------------------------------


def in_batch_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="training within the batch: one encoder, both views, no queue",
        allow_abbrev=False,
    )
    add_options(parser, InBatchConfig)
    parser.set_defaults(**IN_BATCH_DEFAULTS)
    return parser


def in_batch_config(argv: Sequence[str] | None = None) -> InBatchConfig:
    """The config that a command line of train_in_batch.py describes; else exit status 2."""
    parser = in_batch_parser()
    options = parser.parse_args(argv)
    parser.set_defaults(**DATASET_DEFAULTS.get(options.dataset, {}))
    options = parser.parse_args(argv)  # again, with the defaults of the data set
    with _refusals(parser):
        parts = _settle(make_parts(options, InBatchConfig))
        if parts["optim"].lr is None:
            parts["optim"] = replace(parts["optim"], lr=auto_rate(parts["optim"].batch_size))
        config = InBatchConfig(**parts)
        config = _checked(config, config.encoder.dim)
    split = "train" if config.objective.supervised else "pretrain"
    check_data_folder(parser, config.data, {split: config.optim.batch_size})
    objective = "supervised" if config.objective.supervised else objective_slug(config.objective)
    name = f"inbatch-{config.encoder.arch}-{objective}"
    return replace(config, saving=_pretrain_folder(parser, config, name))


def _new_folder(name: str, seed: int) -> Path:
    return Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-s{seed}"


# ------------------------------------------------------------------------------------------------
# scripts/train_sentences.py
# ------------------------------------------------------------------------------------------------


def sentence_parser() -> argparse.ArgumentParser:
    parser = Parser(description="two sentence encoders by Quick-Thought", allow_abbrev=False)
    add_options(parser, SentenceConfig)
    return parser


def sentence_config(argv: Sequence[str] | None = None) -> SentenceConfig:
    """The config that a command line of train_sentences.py describes; else exit status 2."""
    parser = sentence_parser()
    options = parser.parse_args(argv)
    with _refusals(parser):
        config = SentenceConfig(**_settle(make_parts(options, SentenceConfig)))
    text = Path(config.data.data)
    if not text.is_file():
        parser.error(
            f"{text} is a folder, expected a text file"
            if text.is_dir()
            else f"no such text: {text}"
        )
    name = f"sentences-{config.objective.slug()}"
    return replace(config, saving=_pretrain_folder(parser, config, name))


# ------------------------------------------------------------------------------------------------
# main_lincls.py
# ------------------------------------------------------------------------------------------------


def lincls_parser() -> argparse.ArgumentParser:
    parser = Parser(description="linear evaluation of a frozen encoder", allow_abbrev=False)
    add_options(parser, LinclsConfig)
    parser.set_defaults(**PROBE_DEFAULTS)
    return parser


def lincls_config(argv: Sequence[str] | None = None) -> LinclsConfig:
    """The config that a command line of main_lincls.py describes; else exit status 2."""
    parser = lincls_parser()
    options = parser.parse_args(argv)
    if options.finetune:  # again, with the defaults of fine-tuning
        lr, lr_backbone = FINETUNE_RATES["1 %" if options.labels == 1 else "10 %"]
        parser.set_defaults(**FINETUNE_DEFAULTS, lr=(lr,), lr_backbone=lr_backbone)
        options = parser.parse_args(argv)
    elif options.probe == "stl10":
        parser.set_defaults(**STL10_DEFAULTS)
        options = parser.parse_args(argv)
    with _refusals(parser):
        parts = _settle(make_parts(options, LinclsConfig))
        parts["saving"] = _lincls_resume(parser, parts["saving"])
        parts["source"] = replace(
            parts["source"], pretrained=pretrained_file(parser, parts["source"].pretrained)
        )
        config = LinclsConfig(**parts)
    source = config.source.pretrained or config.saving.resume
    if source is None:
        parser.error("give the encoder to evaluate: --pretrained CHECKPOINT")
    for flag, path in (("resume", config.saving.resume), ("pretrained", config.source.pretrained)):
        address = flag == "pretrained" and path and is_url(path)
        if path and not address and not Path(path).is_file():
            parser.error(f"--{flag}: no such checkpoint: {path}")
    batch = config.optim.batch_size if config.trains else 1
    check_data_folder(parser, config.data, {"train": batch, "val": 1})
    if config.saving.save_dir is None:
        source = without_secrets(source).removesuffix("?...")
        stem = Path(source).name.removesuffix(".tar").removesuffix(".pth")
        name = f"lincls-{Path(source).resolve().parent.name}-{stem}"
        run = _new_folder(name, config.optim.seed)
        config = replace(config, saving=replace(config.saving, save_dir=run))
    return config


def _lincls_resume(parser: argparse.ArgumentParser, saving: Folder) -> Folder:
    check_run_folder(parser, saving.save_dir, saving.resume, "lincls")
    if saving.resume != "auto":
        return saving
    latest = saving.save_dir / LINCLS_LATEST
    return replace(saving, resume=str(latest) if latest.is_file() else None)


def pretrained_file(parser: argparse.ArgumentParser, path: str | None) -> str | None:
    """A folder stands for its newest checkpoint, or for the encoder of a release."""
    if path is None or is_url(path) or not Path(path).is_dir():
        return path
    try:
        return str(weights_file(path))
    except CheckpointError as error:
        parser.error(f"--pretrained: {printable(error)}; a folder must be a run's or a release's")


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


def check_run_folder(
    parser: argparse.ArgumentParser, folder: Path | None, resume: str | None, kind: str
) -> None:
    """Never start over in a folder that holds a run, nor mix two runs in one; nor start one whose
    log cannot be written.

    Args:
        kind: of the run that is to be there: "pretraining", "lincls" or "depth".
    """
    try:
        import_optional("tensorboard", "the log of a run")
    except DataError as error:
        parser.error(str(error))
    if folder is None:
        return
    held = {
        "pretraining": [path.name for path in run_checkpoints(folder)],
        "lincls": [name for name in (LINCLS_RESULT, LINCLS_LATEST) if (folder / name).exists()],
        "depth": [name for name in (DEPTH_RESULT, DEPTH_STATE) if (folder / name).exists()],
    }
    own = held.pop(kind)
    other = [name for names in held.values() for name in names]
    continued = resume == "auto" or (resume and Path(resume).resolve().parent == folder.resolve())
    if kind == "pretraining" and not own and (folder / ARGS).exists():
        own = [ARGS]  # that run may be in its first epoch
    if other or (own and not continued):
        parser.error(
            f"{folder} already holds a run ({(other or own)[-1]}): "
            + ("" if other else "go on with --resume auto, or ")
            + "choose another --save-dir"
        )


def check_data_folder(
    parser: argparse.ArgumentParser, data: Data, splits: Mapping[str, int]
) -> None:
    """Refuse a folder that is missing or has too few images, without listing it all.

    Args:
        splits: name of a split and the number of images it needs.
    """
    root = Path(data.data)
    if root.is_file():
        parser.error(f"{root} is a file, expected a data folder with train/ and val/")
    if not root.is_dir():
        parser.error(f"no such data folder: {root}")
    if data.dataset in SUFFIXES:
        try:
            if data.dataset == "parquet":
                import_optional("pyarrow.parquet", "--dataset parquet", "pyarrow")
            for split in splits:
                shard_paths(root, split, data.dataset)
        except DataError as error:
            parser.error(str(error))
    if data.dataset != "folder":
        return
    for split, needed in splits.items():
        try:
            folder = split_folder(root, split)
        except DataError as error:
            parser.error(str(error))
        left_out = LeftOut(folder)
        found = len(list(islice(image_paths(folder, left_out), needed)))
        if not found:
            parser.error(
                f"no images in {folder}; expected FOLDER/train/CLASS/IMAGE as for ImageNet"
                + (", or any folder with images" if split == "pretrain" else "")
                + (f"; {left_out}" if left_out.counts else "")
            )
        if found < needed:
            parser.error(
                f"{folder} has {found} images, fewer than one batch of {needed}; lower --batch-size"
            )
