"""Which way rollouts go by what both have taken."""

from __future__ import annotations

import pytest

from fuse.interstage.evidence import Evidence


def ways(fused: float, serial: float, num_rollouts: int) -> list[bool]:
    """How rollouts go that take so many times the simulated seconds by either way."""
    evidence, taken = Evidence(), []
    for _ in range(num_rollouts):
        taken.append(evidence.is_for_fusion)
        evidence.add(fused if taken[-1] else serial, is_fused=taken[-1])
    return taken


@pytest.mark.parametrize("is_better", [True, False])
def test_both_ways_are_tried_and_then_the_better_one_is_taken_but_for_a_look_at_the_other(is_better: bool) -> None:
    taken = ways(0.98 if is_better else 1.03, 1.0, 40)
    assert taken[:4] == [True, True, False, False]
    assert taken[4:].count(not is_better) == 2
    assert all(one == is_better for one in taken[4:18])


def test_a_clear_gain_is_kept_without_trying() -> None:
    assert all(ways(0.94, 1.0, 40))


def test_a_machine_that_has_changed_is_noticed() -> None:
    evidence = Evidence()
    for _ in range(100):
        is_fused = evidence.is_for_fusion
        evidence.add(1.1 if is_fused else 1.0, is_fused=is_fused)
    assert not evidence.is_for_fusion
    for _ in range(100):
        is_fused = evidence.is_for_fusion
        evidence.add(0.9 if is_fused else 1.0, is_fused=is_fused)
    assert evidence.is_for_fusion
