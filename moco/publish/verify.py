"""Verify a release that was made or downloaded: sums, weights, logs, config and model card."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from moco.checkpoint import read_checkpoint, same_tensors, saved_args
from moco.publish import export
from moco.publish import release_files as files
from moco.publish.card import check_packages, config_and_card
from moco.run_files import ARGS, LOG, read_log, sha256


def verify_release(folder: str | os.PathLike) -> list[str]:
    """What is wrong with a release, one line each that names the file; [] when nothing is."""
    check_packages()
    folder = Path(folder)
    try:
        problems = _check_sums(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    if problems:
        return problems  # the rest would be about other bytes
    for what, check in (
        ("weights", _check_weights),
        ("logs", _check_logs),
        (f"{files.CONFIG} and {files.CARD}", _check_config_and_card),
    ):
        try:
            problems += check(folder)
        except RecursionError:
            return [*problems, f"{what}: values are nested too deeply"]
        except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__} {e}" if isinstance(e, LookupError) else str(e)
            return [*problems, f"{what}: {reason}"]
    return problems


def _check_sums(folder: Path) -> list[str]:
    paths = files.listed(folder)
    if not (folder / files.SUMS).is_file():
        return [f"{files.SUMS} is missing, so this is no release"]
    sums = files.read_sums(folder)
    problems = [f"{path} is missing" for path in sums if not (folder / path).is_file()]
    for path in paths:
        if path not in sums:
            problems.append(f"{path} is not in {files.SUMS}")
            continue
        digest = sha256(folder / path)
        if digest != sums[path]:
            problems.append(
                f"{path} has another SHA-256 than {files.SUMS} says: it was changed or damaged"
            )
        match = files.WEIGHTS.fullmatch(path)
        if match and match[3] != digest[:8]:
            problems.append(
                f"{path} has {match[3]} in its name, its SHA-256 begins with {digest[:8]}"
            )
    problems += [
        f"there is no NAME-{kind}-HASH.{suffix}"
        for kind in ("backbone", "full")
        for suffix in ("pth", "safetensors")
        if not files.is_encoder_only(folder) and (kind, suffix) not in files.weights(folder)
    ]
    return problems + [
        f"{name} is missing" for name in (files.CONFIG, files.CARD) if name not in sums
    ]


def _check_weights(folder: Path) -> list[str]:
    """All files hold one encoder, two of a kind the same tensors, and args.json is theirs."""
    problems = []
    first, of_first = None, ""
    weights = files.weights(folder)
    for path in sorted(itertools.chain(*weights.values())):
        state = export.load_with_head(path, keep="none").encoder.state_dict()
        first, of_first = first or state, of_first or path.name
        if not same_tensors(first, state):
            problems.append(f"{path.name} holds another backbone than {of_first}")
    args = files.read_json(folder / ARGS, or_empty=True)
    args.pop("provenance", None)
    alone = files.is_encoder_only(folder)
    for kind in ("backbone",) if alone else ("full", "linear"):
        paths = [*weights.get((kind, "pth"), []), *weights.get((kind, "safetensors"), [])]
        contents = [read_checkpoint(path) for path in paths]
        states = [content.get("state_dict", content) for content in contents]
        if states and not alone and not (len(states) == 2 and same_tensors(*states)):
            names = ", ".join(path.name for path in paths)
            problems.append(f"{names}: not the same tensors in both")
        if kind != "linear":
            problems += [
                f"{ARGS} is not what {path.name} was trained by"
                for path, content in zip(paths, contents, strict=True)
                if saved_args(content) != args
            ]
    return problems


def _check_logs(folder: Path) -> list[str]:
    """No file names a place of a machine; the accuracies are those of the log and the arguments."""
    problems = []
    for name in (ARGS, files.PROBE_ARGS, files.PROBE, files.METRICS):
        values = files.read_json(folder / name, or_empty=True)
        if export.strip_local_paths(values) != values:
            problems.append(f"{name} names places on the machine that it was written on")
    for name in (LOG, files.PROBE_LOG):
        if (folder / name).is_file() and read_log(folder / name)[1]:
            problems.append(f"{name} has lines that are no lines of a log")
    probed = (folder / files.PROBE).is_file()
    has_linear = ("linear", "pth") in files.weights(folder)
    if probed != has_linear and not files.is_encoder_only(folder):
        return [*problems, f"{files.PROBE} and the file with the classifier belong together"]
    if not (probed and (folder / files.PROBE_LOG).is_file()):
        return problems
    result = files.read_json(folder / files.PROBE)
    args = files.read_json(folder / files.PROBE_ARGS, or_empty=True)
    settings = {**result.get("protocol", {}), "labels": result.get("labels", {}).get("of")}
    settings |= {way: result.get("evaluation") == way for way in ("finetune", "cached")}
    problems += [
        f"{files.PROBE}: {name} is {value!r}, {files.PROBE_ARGS} says {args[name]!r}"
        for name, value in settings.items()
        if name in args and args[name] != value
    ]
    logged = [line for line in read_log(folder / files.PROBE_LOG)[0] if line["kind"] == "val"]
    epochs = {line["epoch"]: line for line in logged}
    for which in ("last", "best") if epochs else ():
        said = result[which]
        for top in ("top1", "top5"):
            in_log = epochs.get(said["epoch"], {}).get(top)
            if in_log != said[top]:
                problems.append(
                    f"{files.PROBE}: {which} {top} is {said[top]}, the log says {in_log}"
                )
    return problems


def _check_config_and_card(folder: Path) -> list[str]:
    """Both are made again from the other files and compared. The card may have more text, but no
    row of a table, licence or file that the release does not have."""
    config = files.read_json(folder / files.CONFIG)
    wanted, card = config_and_card(folder, config["pretrained_cfg"].get("license"))

    def is_claim(line: str) -> bool:
        names = [match[0] for match in files.WEIGHTS.finditer(line)]
        return line.lstrip().startswith(("|", "license:")) or not all(
            (folder / name).is_file() for name in names
        )

    text = (folder / files.CARD).read_text(encoding="utf-8")
    return [
        *_compare(files.CONFIG, _config_lines(config), _config_lines(wanted), lambda line: True),
        *_compare(files.CARD, text.splitlines(), card.splitlines(), is_claim),
    ]


def _config_lines(config: dict) -> list[str]:
    inner = {f"pretrained_cfg.{key}": value for key, value in config["pretrained_cfg"].items()}
    lines = {**config, **inner, "pretrained_cfg": None}.items()
    return sorted(f"{key}: {value!r}" for key, value in lines if value is not None)


def _compare(
    name: str, found: Sequence[str], wanted: Sequence[str], is_claim: Callable[[str], bool]
) -> list[str]:
    """In what a file differs from the lines that the release's other files give; more lines may be
    there if they are no claims. Blank lines do not count."""
    found, wanted = [*filter(str.strip, found)], [*filter(str.strip, wanted)]
    missing, added = Counter(wanted) - Counter(found), Counter(found) - Counter(wanted)
    problems = [f"{name} lacks {line!r}, which the other files say" for line in missing]
    problems += [f"{name} has {line!r}, which no file says" for line in added if is_claim(line)]
    rest = iter(found)
    if not (problems or all(line in rest for line in wanted)):
        problems.append(f"{name} has the lines that it should have in another order")
    return problems
