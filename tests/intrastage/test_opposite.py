"""Opposite replicas as entries of a placement, and what sums of their gradients cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.opposite import (
    UpdateCosts,
    can_have_opposites,
    has_opposites,
    plain_profile,
    with_opposites,
    without_opposites,
)
from fuse.intrastage.placement import Replica, place, share_ranks

SHAPE = Shape(1, 8)


def profile_of(*names: str) -> Profile:
    stages = tuple(
        StageCosts(
            pipeline=name,
            stage=0,
            shape=SHAPE,
            forward_ticks=number + 1,
            backward_ticks=2,
            input_grad_ticks=1,
            weight_grad_ticks=1,
            activation_bytes=0,
            weight_grad_bytes=0,
        )
        for number, name in enumerate(names)
    )
    return Profile(tick_s=1.0, stages=stages, transfers=())


def test_beside_each_replica_there_is_one_in_the_other_direction() -> None:
    cut = replace(place("actor", 4, 4)[0], layer_ranges=((0, 1), (1, 2), (2, 3), (3, 5)))
    down, up = with_opposites((cut,))
    assert down == cut
    assert up == replace(cut, index=1, ranks=(3, 2, 1, 0))
    pairs = with_opposites(place("actor", 4, 2))
    assert [(one.index, one.ranks) for one in pairs] == [(0, (0, 1)), (1, (1, 0)), (2, (2, 3)), (3, (3, 2))]


@pytest.mark.parametrize(("num_ranks", "num_stages"), [(2, 2), (3, 3), (4, 2), (2, 4)])
def test_and_without_it_the_placement_is_what_it_was(num_ranks: int, num_stages: int) -> None:
    placement = place("actor", num_ranks, num_stages)
    both = with_opposites(placement)
    assert without_opposites(both) == without_opposites(placement) == placement
    assert has_opposites(both)
    assert not has_opposites(placement)
    assert share_ranks(both)
    assert not share_ranks(placement)


def test_actor_and_critic_are_no_opposite_replicas() -> None:
    placement = (*place("actor", 4, 4), *place("critic", 4, 2, reverse=True))
    assert not has_opposites(placement)
    assert share_ranks(placement)


def test_whole_models_and_steps_of_few_micro_batches_have_none() -> None:
    assert not can_have_opposites(place("actor", 2, 1), 8)
    assert not can_have_opposites(place("actor", 1, 1), 8)
    assert not can_have_opposites((Replica("actor", 0, (0, 0)),), 8)
    assert [can_have_opposites(place("actor", 4, 2), count) for count in (3, 4)] == [False, True]
    with pytest.raises(ValueError, match="a replica of the actor is on rank 0 alone: it has no bubbles"):
        with_opposites(place("actor", 2, 1))


def test_plain_costs_are_those_of_the_first_of_each_pair() -> None:
    placement = with_opposites(place("actor", 4, 2))
    found = plain_profile(profile_of("actor.0", "actor.1", "actor.2", "actor.3"), placement)
    assert [(one.pipeline, one.forward_ticks) for one in found.stages] == [("actor.0", 1), ("actor.1", 3)]


def test_an_update_lasts_as_long_as_on_its_slowest_rank() -> None:
    costs = UpdateCosts(step_s=1.0, exchange_s=10.0)
    plain = place("actor", 3, 3)
    assert costs.seconds(plain, {"actor": (1, 2, 4)}) == 4
    # Ranks 0 and 2 hold stages 0 and 2 and exchange both: sums, and what each has stepped of
    # them; rank 1 has both copies of stage 1.
    assert costs.seconds(with_opposites(plain), {"actor": (1, 2, 4)}) == 15.5 * (1 + 4)
    assert costs.seconds(with_opposites(plain), {"actor": (1, 60, 4)}) == 2 * 60
    # Data-parallel replicas exchange, too.
    assert costs.seconds(place("actor", 2, 1), {"actor": (5,)}) == 15.5 * 5
    assert UpdateCosts.slowest([UpdateCosts(1.0, 4.0), UpdateCosts(2.0, 3.0)]) == UpdateCosts(2.0, 4.0)
