"""What the engine asks of a task, and what a task without it is told."""

from __future__ import annotations

import pytest
from torch import nn

from moco.errors import CheckpointError
from moco.train.task import Task

REQUIRED = ("build_data", "build_module", "losses", "total")


def task_with(*methods: str) -> type[Task]:
    return type("Mine", (Task,), {name: lambda self, *args: None for name in methods})


@pytest.mark.parametrize("missing", REQUIRED)
def test_a_task_without_a_required_method_cannot_be_made(missing) -> None:
    methods = [name for name in REQUIRED if name != missing]
    with pytest.raises(TypeError, match=missing):
        task_with(*methods)(None)


def test_initial_weights_that_a_task_does_not_take_are_refused_in_one_line() -> None:
    with pytest.raises(CheckpointError, match="--init-from: Mine starts from random weights only"):
        task_with(*REQUIRED)(None).start_from(nn.Linear(1, 1), "file.pth")
