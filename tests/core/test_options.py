"""The flags that both mains share: lists of numbers, plain values, nodes, workers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from helpers import parsed, refusal

from moco import cli
from moco.config import LinclsConfig, PretrainConfig
from moco.launch import usable_cores

MAINS = pytest.mark.parametrize("config", [PretrainConfig, LinclsConfig])


@pytest.fixture
def checked(tmp_path, no_launcher) -> Callable[..., SimpleNamespace]:
    """The flat values of a command line that has been checked, with as many images as it needs."""
    for i in range(16):
        (tmp_path / f"{i}.png").touch()  # nothing opens them

    def checked(*flags: str) -> SimpleNamespace:
        tiny = ["-a", "resnet8", "--image-size", "16", "-b", "8", "--moco-k", "64"]
        config = cli.pretrain_config([*tiny, *flags, "--device", "cpu", str(tmp_path)])
        return SimpleNamespace(**config.to_flat())

    return checked


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
    assert parsed(["--schedule", "30,40", "7"], config).data == "7"  # "30,40" is the whole list


def test_numbers():
    assert cli.numbers("") == ()
    assert cli.numbers("7") == (7,)
    assert cli.numbers("1,2,30,") == (1, 2, 30)
    with pytest.raises(argparse.ArgumentTypeError, match="whole numbers, got '1;2'"):
        cli.numbers("1;2")


def test_flags_are_not_abbreviated(capsys):
    status, line = refusal(cli.parser_of(PretrainConfig).parse_args, ["--batch", 8, "DIR"], capsys)
    assert status == 2
    assert "unrecognized arguments: --batch DIR; did you mean --batch-size?" in line


@MAINS
def test_help_shows_every_default(config, capsys):
    """argparse formats help only when asked: a stray % would fail no other test."""
    with pytest.raises(SystemExit) as stop:
        cli.parser_of(config).parse_args(["--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in ("--save-dir", "--dist-url", "--schedule-factor", "(120, 160)", "(60, 80)"):
        assert (word in out) == (word != ("(60, 80)" if config is PretrainConfig else "(120, 160)"))


def test_flat_values_fit_json_and_weights_only(checked, tmp_path):
    plain = vars(checked("--save-dir", "run", "--schedule", "1", "2", "--crop-scale", ".5", "1"))
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["save_dir"], plain["schedule"], plain["crop_scale"]) == ("run", [1, 2], [0.5, 1])
    assert plain["resume"] is None and "devices" not in plain
    torch.save(plain, tmp_path / "plain.pth")
    assert torch.load(tmp_path / "plain.pth", weights_only=True) == plain


TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0}
TWO_NODES = {**TORCHRUN, "WORLD_SIZE": 8, "GROUP_WORLD_SIZE": 2, "GROUP_RANK": 1}
VARIABLES = {"WORLD_SIZE": 4, "RANK": 2, "MASTER_ADDR": "host", "MASTER_PORT": 1}


@pytest.mark.parametrize(
    ("flags", "environment", "nodes", "rank", "processes", "workers"),
    [
        ("-j 0", {}, 1, 0, 1, 0),
        # -j is of the node, and shared among its processes, rounded up.
        ("-j 1", {**TORCHRUN, "WORLD_SIZE": 2}, 1, 0, 2, 1),
        ("-j 5", {**TORCHRUN, "WORLD_SIZE": 2}, 1, 0, 2, 3),
        ("-j 6", {**TORCHRUN, "WORLD_SIZE": 2}, 1, 0, 2, 3),
        ("-b 16 -j 8", TWO_NODES, 2, 1, 8, 2),
        # Upstream's command lines also run under torchrun, which overrules them.
        ("-j 4 --world-size 1 --rank 0 --dist-url tcp://localhost:10001",
         {**TORCHRUN, "WORLD_SIZE": 4}, 1, 0, 4, 1),
        ("--multiprocessing-distributed", {}, 1, 0, 1, usable_cores()),
        ("-j 3 --world-size 1 --rank 0", {}, 1, 0, 1, 3),
        ("-j 3 --world-size 4 --rank 3 --dist-url tcp://host:1", {}, 4, 3, 4, 3),
        ("-j 3 --dist-url env://", VARIABLES, 4, 2, 4, 3),
        ("-j 3 --dist-url env://", {}, 1, 0, 1, 3),
        ("-b 12 -j 3 --dist-url env:// --world-size 3 --rank 1", VARIABLES, 3, 1, 3, 3),
        ("-j 3 --dist-url tcp://host:1", VARIABLES, 1, 0, 1, 3),
    ],
)  # fmt: skip
def test_nodes_processes_and_workers(
    checked, monkeypatch, flags, environment, nodes, rank, processes, workers
):
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    args = checked(*flags.split())
    assert (args.nodes, args.node_rank, args.processes) == (nodes, rank, processes)
    assert args.workers == workers


def test_a_seed_that_is_not_given_is_drawn_within_31_bits(checked):
    seeds = {checked().seed for _ in range(5)}
    assert len(seeds) > 1 and all(0 <= seed < 2**31 for seed in seeds)
    args = checked("--seed", "0")
    assert args.seed == 0 and args.seed_given


def test_what_the_command_line_says_cannot_repaint_the_terminal(capsys):
    with pytest.raises(SystemExit):
        cli.parser_of(PretrainConfig).parse_args(["DIR", "--\x1b[2J\nwrote:/etc/passwd"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable() and r"\x1b[2J" in line
