"""The flags that both mains share: lists of numbers, plain values, nodes, workers, errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers import parsed
from torch.utils.data import DataLoader, Dataset

from moco import cli
from moco.config import LinclsConfig, PretrainConfig
from moco.errors import CheckpointError, DataError, TrainingError, report_user_errors
from moco.launch import usable_cores

MAINS = pytest.mark.parametrize("config", [PretrainConfig, LinclsConfig])


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def torchrun(monkeypatch, **environment: int) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, **environment}.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def checked(tmp_path) -> Callable[..., SimpleNamespace]:
    """The flat values of a command line that has been checked, with as many images as it needs."""
    for i in range(16):
        (tmp_path / f"{i}.png").touch()  # nothing opens them

    def checked(*flags: str) -> SimpleNamespace:
        tiny = ["-a", "resnet8", "--image-size", "16", "-b", "8", "--moco-k", "64"]
        config = cli.pretrain_config([*tiny, *flags, "--device", "cpu", str(tmp_path)])
        return SimpleNamespace(**config.to_flat())

    return checked


# ---- Lists of numbers ----------------------------------------------------------------------------


@MAINS
def test_lists_are_parsed_wherever_the_folder_stands(config):
    for line in (
        "--schedule 30 40 DIR",
        "DIR --schedule 30 40",
        "--schedule 30 40 --gpus 1 0 DIR",
        "--gpus 1,0 DIR --schedule 30,40",
        "--schedule=30,40 --gpus=1,0 DIR",
    ):
        args = parsed(line.split(), config)
        assert (args.schedule, args.data) == ([30, 40], "DIR"), line
        assert args.gpus in (None, [1, 0]), line
    assert parsed(["--schedule", "--momentum", "0", "DIR"], config).schedule == []


def test_numbers():
    assert cli.numbers("") == ()
    assert cli.numbers("7") == (7,)
    assert cli.numbers("1,2,30,") == (1, 2, 30)
    with pytest.raises(argparse.ArgumentTypeError, match="whole numbers, got '1;2'"):
        cli.numbers("1;2")


@MAINS
def test_flags_are_not_abbreviated(config, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parser_of(config).parse_args(["--batch", "8", "DIR"])
    assert stop.value.code == 2
    assert (
        "unrecognized arguments: --batch DIR; did you mean --batch-size?" in capsys.readouterr().err
    )


@MAINS
def test_help_shows_every_default(config, capsys):
    """argparse formats help only when asked: a stray % would fail no other test."""
    with pytest.raises(SystemExit) as stop:
        cli.parser_of(config).parse_args(["--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in ("--save-dir", "--dist-url", "--schedule-factor", "(120, 160)", "(60, 80)"):
        assert (word in out) == (word != ("(60, 80)" if config is PretrainConfig else "(120, 160)"))


# ---- Derived values ------------------------------------------------------------------------------


def test_flat_values_fit_json_and_weights_only(checked, tmp_path):
    plain = vars(checked("--save-dir", "run", "--schedule", "1", "2", "--crop-scale", ".5", "1"))
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["save_dir"], plain["schedule"], plain["crop_scale"]) == ("run", [1, 2], [0.5, 1])
    assert plain["resume"] is None and "devices" not in plain
    torch.save(plain, tmp_path / "plain.pth")
    assert torch.load(tmp_path / "plain.pth", weights_only=True) == plain


@pytest.mark.parametrize(("asked", "each"), [(0, 0), (1, 1), (2, 1), (5, 3), (6, 3)])
def test_workers_are_of_the_node_and_shared_rounded_up(checked, monkeypatch, asked, each):
    torchrun(monkeypatch, WORLD_SIZE=2)
    assert checked("-b", "8", "-j", str(asked)).workers == each


def test_workers_of_two_nodes_are_shared_on_each(checked, monkeypatch):
    torchrun(monkeypatch, WORLD_SIZE=8, GROUP_WORLD_SIZE=2, GROUP_RANK=1)
    args = checked("-b", "16", "-j", "8")
    assert (args.nodes, args.node_rank, args.processes, args.workers) == (2, 1, 8, 2)


def test_workers_default_to_the_cores_that_may_be_used(checked):
    assert checked().workers == usable_cores() >= 1


def test_torchrun_overrules_world_size_and_rank(checked, monkeypatch):
    """Upstream's command lines also run under torchrun."""
    torchrun(monkeypatch, WORLD_SIZE=4)
    args = checked("--world-size", "1", "--rank", "0", "--dist-url", "tcp://localhost:10001")
    assert (args.nodes, args.node_rank, args.processes) == (1, 0, 4)


@pytest.mark.parametrize(
    ("flags", "environment", "nodes", "rank"),
    [
        ("", {}, 1, 0),
        ("--multiprocessing-distributed", {}, 1, 0),
        ("--world-size 1 --rank 0", {}, 1, 0),
        ("--world-size 4 --rank 3 --dist-url tcp://host:1", {}, 4, 3),
        ("--dist-url env://", {"WORLD_SIZE": 4, "RANK": 2}, 4, 2),
        ("--dist-url env://", {}, 1, 0),
        ("--dist-url env:// --world-size 3 --rank 1", {"WORLD_SIZE": 4, "RANK": 2}, 3, 1),
        ("--dist-url tcp://host:1", {"WORLD_SIZE": 4, "RANK": 2}, 1, 0),
    ],
)
def test_nodes(checked, monkeypatch, flags, environment, nodes, rank):
    for name, value in {**environment, "MASTER_ADDR": "host", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    args = checked("-b", "12", *flags.split())
    assert (args.nodes, args.node_rank, args.processes) == (nodes, rank, nodes)


def test_a_seed_that_is_not_given_is_drawn_within_31_bits(checked):
    seeds = {checked().seed for _ in range(5)}
    assert len(seeds) > 1 and all(0 <= seed < 2**31 for seed in seeds)
    args = checked("--seed", "0")
    assert args.seed == 0 and args.seed_given


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DataError, CheckpointError, TrainingError])
def test_errors_that_the_user_can_mend_end_in_one_line(kind, capsys):
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise kind("no such thing: mend it")
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith("error: no such thing: mend it\n")


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_other_errors_keep_their_trace(kind):
    with pytest.raises(kind, match="ours"), report_user_errors():
        raise kind("ours")


def test_ctrl_c_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith(": interrupted\n")


class Unreadable(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise DataError("cannot read image a.png: it is cut off")


def test_an_error_in_a_loader_process_ends_in_the_same_line(capsys):
    loader = DataLoader(Unreadable(), num_workers=1)
    with pytest.raises(SystemExit), report_user_errors():
        next(iter(loader))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("error: cannot read image a.png: it is cut off")


def test_a_message_of_several_lines_is_shown_whole(capsys):
    with pytest.raises(SystemExit), report_user_errors():
        raise DataError("cannot read image a.png: broken\nat byte 7; replace it")
    assert "a.png" in capsys.readouterr().err


def test_what_the_command_line_says_cannot_repaint_the_terminal(capsys):
    with pytest.raises(SystemExit):
        cli.parser_of(PretrainConfig).parse_args(["DIR", "--\x1b[2J\nwrote:/etc/passwd"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and r"\x1b[2J" in line
