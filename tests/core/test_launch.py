"""Which processes run where: what launchers say, and what a lone process of several is told."""

from __future__ import annotations

import pytest
import torch

from moco.config import Launch
from moco.launch import _LAUNCHERS, Numbered, _own_device, numbered_process, place

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


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": 0}, None),
        ({"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1}, Numbered(1, 4, 1, None)),
        (
            {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4,
             "GROUP_WORLD_SIZE": 2, "GROUP_RANK": 1},
            Numbered(5, 8, 1, 4, 2, 1),
        ),
        ({"RANK": 1, "WORLD_SIZE": 2, **MEETING}, Numbered(1, 2, None, None)),
        (
            {"SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 1, **MEETING},
            Numbered(3, 4, 1, None),
        ),
        ({"SLURM_PROCID": 0, "SLURM_NTASKS": 1}, None),
        (
            {"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2,
             "OMPI_COMM_WORLD_LOCAL_RANK": 0, "OMPI_COMM_WORLD_LOCAL_SIZE": 1, **MEETING},
            Numbered(1, 2, 0, 1),
        ),
        # torchrun within a SLURM task
        (
            {"SLURM_PROCID": 0, "SLURM_NTASKS": 2, "RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1},
            Numbered(3, 4, 1, None),
        ),
    ],
)  # fmt: skip
def test_a_process_knows_its_number(variables, expected, environment) -> None:
    environment(**variables)
    assert numbered_process() == expected


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": 1, "WORLD_SIZE": 2}, "number 1 of 2 (RANK=1, WORLD_SIZE=2"),
        ({"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "a"}, "but MASTER_PORT is not set"),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2}, "as SLURM sets them"),
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


@pytest.mark.parametrize(("flag", "local"), [(None, 0), (1, 1)])
def test_the_local_rank_of_older_launchers_is_taken(flag, local, environment) -> None:
    environment(RANK=1, WORLD_SIZE=2, **MEETING)
    assert place(Launch(local_rank=flag)).number == (1, 2, local)


def test_env_without_an_address_is_refused(environment) -> None:
    environment(RANK=1, WORLD_SIZE=2)
    with pytest.raises(ValueError, match="env:// needs MASTER_ADDR and MASTER_PORT"):
        place(Launch(dist_url="env://"))


def test_placement_is_of_this_node_and_of_all(environment) -> None:
    environment(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, GROUP_WORLD_SIZE=2, GROUP_RANK=1)
    placement = place(Launch(device="cpu"))
    assert (placement.nodes, placement.node_rank, placement.processes) == (2, 1, 8)
    assert (placement.local_processes, placement.number) == (4, (5, 8, 1))


def test_each_process_has_a_device_of_its_own() -> None:
    gpus = [torch.device("cuda", index) for index in range(2)]
    assert [_own_device(gpus, rank) for rank in (0, 1)] == gpus
    assert _own_device(gpus[:1], 3) == gpus[0]  # srun shows each task its own GPU only
    assert _own_device([CPU], 3) == CPU
    with pytest.raises(ValueError, match="local rank 2 has no GPU: 2 usable"):
        _own_device(gpus, 2)
