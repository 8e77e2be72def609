"""Which processes run where: what launchers say, and what a lone process of several is told."""

from __future__ import annotations

import os
import re
import shlex
from datetime import timedelta
from pathlib import Path

import harness
import pytest
import torch
from harness import differences, final_state, free_port
from helpers import ROOT
from torch.distributed.run import get_args_parser

from moco import cli, distributed
from moco.config import Launch, Placement, PretrainConfig
from moco.launch import _LAUNCHERS, _own_device, launch, place, visible_devices

CPU = torch.device("cpu")
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No launcher's variables; returns a function that sets some."""
    groups = ("GROUP_WORLD_SIZE", "GROUP_RANK")
    for name in (*MEETING, *groups, *(name for names in _LAUNCHERS.values() for name in names)):
        monkeypatch.delenv(name, raising=False)

    def set_all(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_all


def numbers(flag: int | None = None) -> tuple:
    """Nodes, this node, processes, those of this node, and (rank, world, local rank)."""
    placed = place(Launch(device="cpu", local_rank=flag))
    nodes = placed.nodes, placed.node_rank
    return *nodes, placed.processes, placed.local_processes, placed.number


TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "GROUP_WORLD_SIZE": 2, "GROUP_RANK": 1}


@pytest.mark.parametrize(
    ("variables", "flag", "expected"),
    [
        ({}, None, (1, 0, 1, 1, None)),
        ({"RANK": 0}, None, (1, 0, 1, 1, None)),
        ({"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1}, None, (1, 0, 4, 4, (1, 4, 1))),
        (TORCHRUN, None, (2, 1, 8, 4, (5, 8, 1))),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": 3}, None, (2, 1, 8, 3, (5, 8, 1))),  # nodes may differ
        # Without LOCAL_RANK not torchrun's: groups may be of a job around this one.
        ({"RANK": 1, "WORLD_SIZE": 2, "GROUP_WORLD_SIZE": 4, "GROUP_RANK": 3, **MEETING}, None,
         (1, 0, 2, 2, (1, 2, 0))),
        # --local-rank of older launchers
        ({"RANK": 1, "WORLD_SIZE": 2, **MEETING}, 1, (1, 0, 2, 2, (1, 2, 1))),
        ({"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0}, 1, (1, 0, 2, 2, (1, 2, 0))),
        ({"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1, **MEETING}, None,
         (1, 0, 4, 4, (3, 4, 1))),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 1}, None, (1, 0, 1, 1, None)),
        ({"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": 0,
          "OMPI_COMM_WORLD_LOCAL_SIZE": 1, **MEETING}, None, (1, 0, 2, 1, (1, 2, 0))),
        # torchrun within a SLURM task
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 2, "RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}, None,
         (1, 0, 4, 4, (3, 4, 1))),
    ],
)  # fmt: skip
def test_a_process_knows_its_number(variables, flag, expected, environment) -> None:
    environment(**variables)
    assert numbers(flag) == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": 1, "WORLD_SIZE": 2}, "number 1 of 2 (RANK=1, WORLD_SIZE=2"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "a"}, "but MASTER_PORT is not set"),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2, "SLURM_LOCALID": 1}, "as SLURM sets them"),
        ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 2}, "as Open MPI sets them"),
        ({"PMI_RANK": 0, "PMI_SIZE": 2}, "MASTER_ADDR and MASTER_PORT are not set"),
    ],
)
def test_one_of_several_that_cannot_meet_the_others_is_refused(
    variables, words, environment
) -> None:
    environment(**variables)
    with pytest.raises(ValueError) as refused:
        place(Launch())
    assert words in str(refused.value) and "to train alone" in str(refused.value)
    # A command line that says how processes meet is upstream's, whatever the environment has.
    assert place(Launch(world_size=1, rank=0, dist_url="tcp://localhost:1")).processes == 1
    for said in ({"world_size": 1}, {"rank": 0}, {"dist_url": "tcp://localhost:1"}):
        assert place(Launch(**said)).processes == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, 0, 8, 8, (5, 8, 1))),
        ({"LOCAL_RANK": 2, "LOCAL_WORLD_SIZE": 3}, (3, 1, 8, 3, (5, 8, 2))),
    ],
)
def test_a_group_that_exists_has_the_first_word(
    variables, expected, environment, monkeypatch
) -> None:
    for name, value in {"is_active": True, "rank": 5, "world_size": 8}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    environment(RANK=0, WORLD_SIZE=1, **variables)
    assert numbers(flag=1) == expected


def test_a_group_that_begins_after_the_config_is_joined(environment, monkeypatch) -> None:
    environment()
    seen = []
    for name, value in {"is_active": True, "rank": 0, "world_size": 1}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "set_timeout", seen.append)
    minute = Launch(device="cpu", timeout_minutes=1)
    launch(lambda device, _: seen.append(device), None, minute, Placement())
    assert seen == [timedelta(minutes=1), CPU]


def test_env_without_an_address_is_refused(environment) -> None:
    assert place(Launch(dist_url="env://")).processes == 1, "there is nobody to meet"
    environment(RANK=1, WORLD_SIZE=2)
    with pytest.raises(ValueError, match="env:// needs MASTER_ADDR and MASTER_PORT"):
        place(Launch(dist_url="env://"))


def test_an_empty_url_is_none(environment) -> None:
    """As a job script writes it whose variable is not set."""
    environment()
    assert place(Launch(device="cpu", dist_url="")).processes == 1
    with pytest.raises(ValueError, match="2 nodes need --dist-url tcp://HOST:PORT"):
        place(Launch(device="cpu", dist_url="", world_size=2))


def test_each_process_has_a_device_of_its_own() -> None:
    gpus = [torch.device("cuda", index) for index in range(2)]
    assert [_own_device(gpus, rank) for rank in (0, 1)] == gpus
    assert _own_device(gpus[:1], 3) == gpus[0]  # srun shows each task its own GPU only
    assert _own_device([CPU], 3) == CPU
    with pytest.raises(ValueError, match="local rank 2 has no GPU: 2 usable"):
        _own_device(gpus, 2)


@pytest.mark.parametrize(
    ("count", "device", "gpus", "expected"),
    [
        (2, "cpu", None, ["cpu"]),
        (2, "cpu", [], ["cpu"]),
        (0, "auto", None, ["cpu"]),
        (2, "auto", None, ["cuda:0", "cuda:1"]),
        (2, "cuda", [1], ["cuda:1"]),
        (0, "cuda", None, "no GPU is visible; use --device cpu"),
        (0, "auto", [0], "GPU 0 does not exist: 0 visible on this machine; leave out --gpu/--gpus"),
        (2, "auto", [2, 5], "GPU 2, 5 does not exist: 2 visible on this machine (0 to 1)"),
        (2, "cuda", [-1], "GPU -1 does not exist"),
        (2, "auto", [0, 0], "a GPU is named twice in [0, 0]"),
        (2, "cpu", [0], "--device cpu was asked for together with --gpus [0]"),
    ],
)
def test_devices_of_this_node(count, device, gpus, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            visible_devices(device, gpus)
    else:
        assert list(map(str, visible_devices(device, gpus))) == expected


def test_a_process_that_is_told_no_local_rank_takes_the_devices_in_turn(
    environment, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(RANK=3, WORLD_SIZE=4, **MEETING)
    assert place(Launch()).number == (3, 4, 1)


# ---- Processes -----------------------------------------------------------------------------------


def who(device: torch.device, folder: Path) -> None:
    rank = distributed.rank()
    about = [distributed.is_active(), rank, distributed.world_size(), distributed.is_main()]
    torch.save([os.getpid(), *about, str(device)], folder / f"rank{rank}.pt")


def test_one_device_runs_in_place_without_a_process_group(tmp_path) -> None:
    launch(who, tmp_path, Launch(device="cpu"))
    assert torch.load(tmp_path / "rank0.pt") == [os.getpid(), False, 0, 1, True, "cpu"]


@pytest.mark.long
def test_several_devices_have_a_spawned_process_with_a_rank_each(tmp_path) -> None:
    two = Placement(devices=("cpu", "cpu"), processes=2, local_processes=2)
    launch(who, tmp_path, Launch(), two)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert len({os.getpid(), first[0], second[0]}) == 3
    assert first[1:] == [True, 0, 2, True, "cpu"]
    assert second[1:] == [True, 1, 2, False, "cpu"]
    assert not distributed.is_active()


def test_under_torchrun_this_process_joins_its_group_and_leaves_it_after_an_error(
    environment, tmp_path
) -> None:
    def worker(device: torch.device, folder: Path) -> None:
        who(device, folder)
        raise KeyError("from the worker")

    environment(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, **{**MEETING, "MASTER_PORT": free_port()})
    with pytest.raises(KeyError, match="from the worker"):
        launch(worker, tmp_path, Launch(device="cpu"))
    assert torch.load(tmp_path / "rank0.pt") == [os.getpid(), True, 0, 1, True, "cpu"]
    assert not distributed.is_active()


OWN_GROUP = """
import os
import torch, torch.distributed as dist
said = {name: os.environ.pop(name) for name in
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
rank, world = int(said["RANK"]), int(said["WORLD_SIZE"])
address = f"tcp://{said['MASTER_ADDR']}:{said['MASTER_PORT']}"
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
"""
STILL_THERE = """
total = torch.tensor(rank + 1)
dist.all_reduce(total)
print("still there", total.item())
dist.destroy_process_group()
"""


@pytest.mark.long
def test_a_group_that_exists_is_trained_in_and_left(images, whole, tmp_path) -> None:
    """As Ray Train, Lightning Fabric and accelerate make it: no variable tells of it. The run is
    that of two processes that torchrun has started, bit for bit."""
    run = tmp_path / "run"
    argv = [*harness.FLAGS, "-j", 0, "--save-dir", run, images]
    processes = harness.Processes(
        tmp_path / "out", *argv, count=2, before=OWN_GROUP, code=harness.MAIN + STILL_THERE
    )
    assert processes.wait() == [0, 0], processes.output()
    for rank in (0, 1):
        assert "still there 3" in processes.output(rank)
    assert differences(final_state(run), final_state(whole[2])) == []


# ---- The lines of docs/training.md, and SkyPilot's file ------------------------------------------

LINES = re.findall(
    r"^(?:.*)main_moco.py DIR", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.M
)


def torchrun_line(command: str) -> object:
    words = shlex.split(command)
    options = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert options.training_script == "main_moco.py"
    return options


def test_torchruns_line() -> None:
    (line,) = (line for line in LINES if line.startswith("torchrun --nnodes"))
    options = torchrun_line(line)
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")
    assert options.rdzv_endpoint == "HOST:29500" and options.training_script_args == ["DIR"]


@pytest.mark.parametrize(
    ("begins", "more"),
    [
        ("MASTER_ADDR=", {"SLURM_PROCID": 9, "SLURM_NTASKS": 16, "SLURM_LOCALID": 1,
                          "SLURM_NTASKS_PER_NODE": 8}),
        ("RANK=0", {"RANK": 9, "LOCAL_RANK": 1}),
    ],
)  # fmt: skip
def test_the_lines_of_slurm_and_of_an_environment(begins, more, environment) -> None:
    """Process 9 of 16: the variables that the line sets, and those that srun or the user adds."""
    (line,) = (line for line in LINES if line.startswith(begins))
    words = shlex.split(line)
    environment(**{**dict(word.split("=") for word in words if re.match("[A-Z_]+=", word)), **more})
    placement = place(Launch())
    assert placement.processes == 16 and placement.number == (9, 16, 1)


def test_skypilots_file() -> None:
    text = (ROOT / "scripts" / "skypilot" / "imagenet.yaml").read_text(encoding="utf-8")
    command = text.partition("\nrun: |\n")[2].replace("\\\n", " ")
    for name, value in {"NUM_NODES": 2, "NUM_GPUS_PER_NODE": 8, "NODE_RANK": 1}.items():
        command = command.replace(f"$SKYPILOT_{name}", str(value))
    command = re.sub(r"\$\(.*?\)", "HOST", command)
    options = torchrun_line(command)
    assert (options.nnodes, options.nproc_per_node, options.node_rank) == ("2", "8", 1)
    parsed = cli.parser_of(PretrainConfig).parse_args(options.training_script_args)
    recipe = (ROOT / "scripts" / "imagenet_align_uniform.sh").read_text(encoding="utf-8")
    for flag in ("--epochs 200", "--batch-size 256", "--lr 0.03", "--aug-plus", "--mlp", "--cos"):
        assert flag in recipe and flag in command
    assert parsed.resume == "auto" and parsed.data == "$DATA"
