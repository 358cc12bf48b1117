"""Profiles: what is read equals what was written, ranks' parts make a whole, and lookups take the right bucket."""

from __future__ import annotations

import json

import pytest

from fuse.intrastage.cost_profile import (
    Profile,
    Shape,
    StageCosts,
    TransferCosts,
    merge,
    profile_from_json,
    profile_to_json,
)

SHORT, LONG = Shape(2, 64), Shape(2, 256)


def stage_costs(stage: int, shape: Shape, ticks: int = 10, *, split: bool = True) -> StageCosts:
    return StageCosts(
        pipeline="actor.0",
        stage=stage,
        shape=shape,
        forward_ticks=ticks,
        backward_ticks=2 * ticks,
        input_grad_ticks=ticks if split else None,
        weight_grad_ticks=ticks if split else None,
        activation_bytes=1000 * ticks,
        weight_grad_bytes=500 * ticks,
    )


def transfer(stage: int, shape: Shape, ticks: int) -> TransferCosts:
    return TransferCosts(pipeline="actor.0", stage=stage, shape=shape, ticks=ticks)


def profile_of(stages: tuple[StageCosts, ...], transfers: tuple[TransferCosts, ...] = ()) -> Profile:
    return Profile(tick_s=1e-5, stages=stages, transfers=transfers)


FIRST = profile_of((stage_costs(0, SHORT), stage_costs(0, LONG, 40)), (transfer(0, SHORT, 3), transfer(0, LONG, 5)))
SECOND = profile_of((stage_costs(1, LONG, 44, split=False), stage_costs(1, SHORT, 11, split=False)))


def test_what_is_read_equals_what_was_written() -> None:
    whole = merge([FIRST, SECOND])
    assert profile_from_json(json.loads(json.dumps(profile_to_json(whole)))) == whole


def test_ranks_merge_in_any_order() -> None:
    whole = merge([SECOND, FIRST])
    assert whole == merge([FIRST, SECOND])
    assert [(cost.stage, cost.shape) for cost in whole.stages] == [(0, SHORT), (0, LONG), (1, SHORT), (1, LONG)]


def test_a_shape_is_looked_up_in_the_smallest_bucket_that_holds_it() -> None:
    whole = merge([FIRST, SECOND])
    assert [whole.stage_costs("actor.0", 0, Shape(2, tokens)).forward_ticks for tokens in (1, 64, 65, 999)] == [
        10,
        10,
        40,
        40,
    ]
    assert whole.stage_costs("actor.0", 1, Shape(1, 300)).forward_ticks == 44  # 300 tokens in all, 512 in the bucket
    assert [whole.transfer_ticks("actor.0", shape) for shape in (SHORT, LONG)] == [3, 5]
    assert whole.transfer_ticks("critic.0", SHORT) == 0


def test_refusals_name_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"stage 0 of actor\.0 was measured twice.*give each to one rank"):
        merge([FIRST, FIRST])
    with pytest.raises(ValueError, match=r"measure all ranks with one tick_s"):
        merge([FIRST, Profile(tick_s=1e-3, stages=(), transfers=())])
    with pytest.raises(ValueError, match=r"no stage 2 of pipeline actor\.0: measure it"):
        FIRST.stage_costs("actor.0", 2, SHORT)
    with pytest.raises(ValueError, match="not a profile of version 1"):
        profile_from_json({"profile": 0})
    with pytest.raises(ValueError, match="Profile must have exactly"):
        profile_from_json({"profile": 1, "tick_s": 1.0})
