"""Layers follow measured times: a heavy head takes some off the last stage, and the best division is found."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.placement import Replica, place
from fuse.intrastage.stage_balance import LayerCosts, balance_stages

SHAPE = Shape(2, 64)


def costs(role: str, stage: int, ticks: int) -> StageCosts:
    return StageCosts(
        pipeline=role,
        stage=stage,
        shape=SHAPE,
        forward_ticks=ticks,
        backward_ticks=2 * ticks,
        input_grad_ticks=ticks,
        weight_grad_ticks=ticks,
        activation_bytes=100 * ticks,
        weight_grad_bytes=50 * ticks,
    )


def layer_costs(role: str, *, embedding: int = 0, layer: int = 10, head: int = 0) -> LayerCosts:
    ticks = (layer + embedding, layer, layer + head)
    profile = Profile(
        tick_s=1e-3, stages=tuple(costs(role, stage, one) for stage, one in enumerate(ticks)), transfers=()
    )
    return LayerCosts.of([profile], role)


def balanced(
    actor: LayerCosts, critic: LayerCosts, *, num_ranks: int = 2, num_layers: int = 8, is_fused: bool = True
) -> dict[str, Replica]:
    placement = (*place("actor", num_ranks, num_ranks), *place("critic", num_ranks, num_ranks, reverse=True))
    found = balance_stages(
        {"actor": actor, "critic": critic},
        placement,
        {"actor": num_layers, "critic": num_layers},
        4,
        is_fused=is_fused,
        tick_s=1e-3,
    )
    return {replica.model: replica for replica in found}


def test_a_stage_costs_its_layers_and_what_stands_at_its_end() -> None:
    measured = layer_costs("actor", embedding=3, layer=10, head=25)
    assert [measured.stage("actor.0", stage, 3, 2).forward_ticks for stage in range(3)] == [23, 20, 45]
    assert measured.stage("actor.0", 0, 1, 4).forward_ticks == 40 + 3 + 25
    assert measured.stage("actor.0", 2, 3, 2).activation_bytes == 4500
    whole = replace(costs("actor", 1, 10), input_grad_ticks=None, weight_grad_ticks=None)
    assert LayerCosts(whole, whole, whole).stage("actor.0", 0, 2, 3).input_grad_ticks is None


def test_layer_costs_are_medians_over_ranks() -> None:
    profiles = [
        Profile(tick_s=1e-3, stages=tuple(costs("actor", stage, ticks) for stage in range(3)), transfers=())
        for ticks in (10, 11, 90)
    ]
    assert LayerCosts.of(profiles, "actor").layer.forward_ticks == 11


@pytest.mark.parametrize("is_fused", [True, False])
def test_alike_stages_get_equally_many_layers_and_run_against_each_other(is_fused: bool) -> None:
    found = balanced(layer_costs("actor"), layer_costs("critic"), is_fused=is_fused)
    assert found["actor"].layer_ranges == found["critic"].layer_ranges == ((0, 4), (4, 8))
    assert found["actor"].ranks == (0, 1)
    assert found["critic"].ranks == (1, 0)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    # Without fusion the actor is fastest with stages as equal as can be: 6 layers beside 2 layers and a head of 4.
    found = balanced(layer_costs("actor", head=40), layer_costs("critic"), is_fused=False)
    assert found["actor"].layer_ranges == ((0, 6), (6, 8))
    assert found["critic"].layer_ranges == ((0, 4), (4, 8))


def test_fused_models_balance_each_other() -> None:
    # A rank's time is what both models take on it. The actor's head (4 layers' worth) is on the last rank, so the
    # layers (16 of both models) should be 10 on the first and 6 on the last.
    found = balanced(layer_costs("actor", head=40), layer_costs("critic"))
    on_last = sum(
        stop - start
        for replica in found.values()
        for rank, (start, stop) in zip(replica.ranks, replica.layer_ranges or (), strict=True)
        if rank == found["actor"].ranks[-1]
    )
    assert on_last == 6


def test_no_stage_is_left_without_a_layer_and_none_is_lost() -> None:
    found = balanced(layer_costs("actor", head=1000), layer_costs("critic", embedding=500), num_ranks=3, num_layers=4)
    for replica in found.values():
        assert replica.layer_ranges is not None
        assert all(start < stop for start, stop in replica.layer_ranges)
        assert (replica.layer_ranges[0][0], replica.layer_ranges[-1][1]) == (0, 4)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(replica.layer_ranges))
