"""The learning rate as a pure function of the epoch: upstream's steps and cosine."""

import math

import pytest

from moco.schedule import learning_rate


def rates(epochs: int, **options) -> list[float]:
    return [learning_rate(epoch, base=0.03, epochs=epochs, **options) for epoch in range(epochs)]


def test_steps_multiply_by_a_tenth_from_each_milestone_on():
    """Upstream's 120 and 160 of 200 epochs: the milestone itself has the lower rate."""
    got = rates(200, milestones=[120, 160])
    assert got[:120] == [0.03] * 120
    assert got[120:160] == pytest.approx([0.003] * 40)
    assert got[160:] == pytest.approx([0.0003] * 40)


def test_steps_take_another_factor_and_any_order_of_milestones():
    assert rates(4, milestones=[3, 1], factor=0.5) == pytest.approx([0.03, 0.015, 0.015, 0.0075])
    assert rates(3, milestones=[1, 1]) == pytest.approx([0.03, 0.0003, 0.0003])  # once for each
    assert rates(3) == [0.03] * 3


def test_cosine_is_upstreams_half_wave():
    """base / 2 * (1 + cos(pi * epoch / epochs)): base at first, half in the middle, not yet 0."""
    got = rates(200, cos=True, milestones=[120, 160])  # --cos takes the place of --schedule
    assert got[0] == 0.03
    assert got[100] == pytest.approx(0.015)
    assert got[199] == pytest.approx(0.015 * (1 + math.cos(math.pi * 199 / 200)))
    assert got == sorted(got, reverse=True) and got[-1] > 0


@pytest.mark.parametrize("options", [{"cos": True}, {"milestones": [1, 6]}], ids=str)
def test_warm_up_scales_the_first_epochs_only(options):
    plain, warm = rates(10, **options), rates(10, warmup_epochs=4, **options)
    for epoch, share in enumerate([1 / 5, 2 / 5, 3 / 5, 4 / 5]):
        assert warm[epoch] == pytest.approx(share * plain[epoch])
    assert warm[4:] == plain[4:]
