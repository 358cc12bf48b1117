"""Layers follow measured times: a heavy head takes some off the last stage, and the best division is found."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fuse.intrastage import stage_balance
from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.placement import Replica, one_of_alike, place
from fuse.intrastage.search_time import SearchTime
from fuse.intrastage.stage_balance import LayerCosts, balance_stages, predicted_step_s, unfused_stages
from schedules.fused.parts import busiest_ticks

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
        within=SearchTime(60.0),
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


def test_of_groups_of_replicas_that_are_alike_one_stands_for_all() -> None:
    placement = (*place("actor", 256, 32), *place("critic", 256, 64, reverse=True))
    group, counts = one_of_alike(placement, 1023)
    assert [(one.name, one.ranks) for one in group] == [
        ("actor.0", tuple(range(32))),
        ("actor.1", tuple(range(32, 64))),
        ("critic.0", tuple(range(64))[::-1]),
    ]
    assert dict(counts) == {"actor": 256, "critic": 256}  # type: ignore[arg-type]  # 128 each, where the last has 127
    opposite = with_opposites(place("actor", 4, 2))
    assert one_of_alike(opposite, 8) == (opposite[:2], (("actor", 4),))
    for single in (place("actor", 4, 4), (*place("actor", 4, 2), *place("critic", 2, 2))):
        assert one_of_alike(single, 8) == (single, 8)


@pytest.mark.parametrize("is_fused", [True, False])
def test_replicas_are_cut_as_one_of_them_is(is_fused: bool) -> None:
    costs_of = {"actor": layer_costs("actor", head=40), "critic": layer_costs("critic", embedding=15)}
    num_layers = dict.fromkeys(costs_of, 8)
    found = {}
    for num_ranks in (2, 4):
        placement = (*place("actor", num_ranks, 2), *place("critic", num_ranks, 2))
        cut = balance_stages(
            costs_of, placement, num_layers, 2 * num_ranks, is_fused=is_fused, tick_s=1e-3, within=SearchTime(60.0)
        )
        assert [(one.model, one.index) for one in cut] == [(one.model, one.index) for one in placement]
        assert [set(one.ranks) for one in cut] == [set(one.ranks) for one in placement]
        found[num_ranks] = {(one.model, one.layer_ranges, one.ranks[0] % 2) for one in cut}
        steps = predicted_step_s(costs_of, cut, 2 * num_ranks, is_fused=is_fused, tick_s=1e-3)
        found[num_ranks].add(("step", None, round(1e3 * steps)))
    assert found[2] == found[4]


@pytest.mark.parametrize("schedule_s", [3.0, 100.0])
def test_a_search_for_256_devices_ends_in_time(monkeypatch: pytest.MonkeyPatch, schedule_s: float) -> None:
    """By a clock on which a schedule takes seconds; whatever was tried by then, the best of it is taken."""
    now_s, limit_s = [0.0], 40.0

    def timed(schedule: Any) -> Any:
        problem = getattr(schedule, "problem", schedule)
        assert problem.num_ranks == 32
        now_s[0] += schedule_s
        return SimpleNamespace(makespan=busiest_ticks(problem))

    monkeypatch.setattr(stage_balance, "greedy", lambda problem: problem)
    monkeypatch.setattr(stage_balance, "evaluate", timed)
    costs_of = {"actor": layer_costs("actor", head=90), "critic": layer_costs("critic", embedding=50)}
    placement = (*place("actor", 256, 32), *place("critic", 256, 32, reverse=True))
    asked = costs_of, placement, dict.fromkeys(costs_of, 128), 1024
    within = SearchTime(limit_s, lambda: now_s[0])
    cut = balance_stages(*asked, is_fused=True, tick_s=1e-3, within=within)
    assert now_s[0] <= limit_s + schedule_s
    unfused_stages(*asked, tick_s=1e-3, within=within)
    assert now_s[0] <= limit_s + schedule_s
    sizes = {one.model: [stop - start for start, stop in one.layer_ranges or ()] for one in cut}
    assert sizes.keys() == costs_of.keys()
    if schedule_s < limit_s:
        assert sizes["actor"][-1] < 4, "the head is worth nine layers"
    else:
        assert all(own == [4] * 32 for own in sizes.values())
