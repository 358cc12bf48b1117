"""Policies: what they do in states small enough to work out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import SMALL_CPU, CostModel
from fuse.interstage.lengths import KnownLengths, learn
from fuse.interstage.migration import (
    EndedSamples,
    EngineLimits,
    Infer,
    LiveSamples,
    Migrate,
    Release,
    RolloutState,
    StageByStage,
    Threshold,
    balance,
    feed,
)

LIMITS = EngineLimits(max_batch=4, kv_capacity_tokens=1000, max_new_tokens=10)
FREE_MOVES = CostModel(
    step_s=1.0, sample_s=1.0, context_s=0.0, prefill_s=0.0, prefill_token_s=0.0, inference_s=0.0,
    inference_token_s=1e-3, kv_bytes_per_token=1, transfer_s=0.0, transfer_byte_s=0.0,
)  # fmt: skip


def state(
    devices: Sequence[int],
    *,
    num_devices: int,
    response_tokens: Sequence[int] | None = None,
    finished: dict[int, int] | None = None,
    released: Sequence[int] = (),
    inferring: Sequence[int] = (),
    lost: Sequence[int] = (),
    limits: EngineLimits = LIMITS,
) -> RolloutState:
    """Sample i is on devices[i], with a prompt of 5 tokens; `finished` gives the tokens of others by id."""
    num = len(devices)
    flags = np.zeros(num_devices, dtype=bool)
    flags[list(released)] = True
    busy = np.zeros(num_devices, dtype=np.int64)
    busy[list(inferring)] = 100
    return RolloutState(
        limits=limits,
        live=LiveSamples(
            ids=np.arange(num),
            devices=np.array(devices, dtype=np.int64),
            prompt_tokens=np.full(num, 5),
            response_tokens=np.array(response_tokens or [1] * num, dtype=np.int64),
            started=np.ones(num, dtype=bool),
            movable=~np.isin(np.array(devices, dtype=np.int64), list(lost)),  # what goes to a lost engine has left
            prompts=np.arange(num),
        ),
        ended=EndedSamples(np.array(list(finished or {}), dtype=np.int64), np.full(len(finished or {}), 5)),
        finished_ids=np.array(list(finished or {}), dtype=np.int64),
        finished_tokens=np.array(list((finished or {}).values()), dtype=np.int64),
        released=flags,
        inferring_tokens=busy,
        inferring_left=busy / 2,
        lost=np.isin(np.arange(num_devices), list(lost)),
    )


def test_stage_by_stage_waits_for_the_last_sample_and_then_balances() -> None:
    policy, finished = StageByStage(), {3: 10, 4: 30, 5: 20}
    assert policy(state([1], num_devices=2, finished=finished)) == []
    assert policy(state([], num_devices=2, finished=finished)) == [
        Release(0), Infer(0, (4,)), Release(1), Infer(1, (5, 3)),
    ]  # fmt: skip


def test_threshold_does_nothing_above_it() -> None:
    assert Threshold(remaining=2, num_kept=1)(state([0, 0, 1], num_devices=3, finished={9: 2000})) == []


def test_a_lost_engine_is_no_destination_and_still_scores() -> None:
    """Device 1's engine died while samples were on their way to it."""
    seen = state([0, 1, 1, 2], num_devices=4, finished={9: 2000}, lost=[1, 3])
    actions = Threshold(remaining=4, num_kept=1)(seen)
    assert {action.target for action in actions if isinstance(action, Migrate)} == {0}
    assert Infer(3, (9,)) in actions or Infer(2, (9,)) in actions
    for devices in ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2], [0, 0, 0, 1, 1, 2]):
        for ages in ([1] * 6, [1, 2, 3, 50, 60, 61]):
            crowded = state(devices, num_devices=4, response_tokens=ages, lost=[1, 3])
            planned = Adaptive(SMALL_CPU, learn([], LIMITS.max_new_tokens).for_samples())(crowded)
            assert not {action.target for action in planned if isinstance(action, Migrate)} & {1, 3}


def test_threshold_keeps_the_most_loaded_engine_and_sets_the_others_to_inference() -> None:
    actions = Threshold(remaining=3, num_kept=1)(state([0, 1, 1], num_devices=3, finished={9: 2000}))
    assert actions == [Migrate(0, 0, 1), Release(0), Infer(0, (9,))]


def test_threshold_keeps_more_engines_where_the_batch_limit_asks_for_them() -> None:
    # Six samples and batches of four: two engines, and the sixth and fifth go to the one with more places.
    actions = Threshold(remaining=6, num_kept=1)(state([0, 0, 0, 1, 1, 2], num_devices=3))
    assert actions == [Migrate(5, 2, 1)]


def test_threshold_keeps_more_engines_where_kv_asks_for_them() -> None:
    tight = EngineLimits(max_batch=4, kv_capacity_tokens=30, max_new_tokens=10)  # two samples of 5 + 10
    assert Threshold(remaining=4, num_kept=1)(state([0, 1, 1, 2], num_devices=3, limits=tight)) == [Migrate(3, 2, 0)]


def test_threshold_migrates_once() -> None:
    assert Threshold(remaining=3, num_kept=2)(state([0, 1, 1], num_devices=3)) == []


def test_inference_goes_to_free_devices_only_in_pieces_of_about_equal_tokens() -> None:
    finished = {10: 600, 11: 200, 12: 200, 13: 200}
    actions = feed(state([0], num_devices=4, finished=finished, released=[3], inferring=[2]))
    assert actions == [Infer(3, (10,)), Release(1), Infer(1, (11, 12, 13))]


def test_little_is_scored_when_more_has_come_or_nothing_more_is_to_come() -> None:
    finished = {10: 3, 11: 5, 12: 4}
    assert feed(state([0], num_devices=3, finished=finished), least_tokens=13) == []
    assert feed(state([0], num_devices=3, finished=finished), least_tokens=12) != []
    pieces = [action for action in feed(state([], num_devices=3, finished=finished)) if isinstance(action, Infer)]
    assert pieces == [Infer(0, (11,)), Infer(1, (12,)), Infer(2, (10,))]


def test_at_the_end_devices_get_all_they_will_score_beside_what_others_have_left() -> None:
    """Device 1 has 50 tokens left: with 10 of the 70 it ends when device 0 does that has the others."""
    finished = {10: 30, 11: 10, 12: 20, 13: 10}
    seen = state([], num_devices=2, finished=finished, inferring=[1], released=[0, 1])
    assert feed(seen, least_tokens=10) == [Infer(0, (10, 12, 11))]
    assert feed(seen, least_tokens=30) == [Infer(0, (10, 12, 11, 13))], "the rest is not worth a piece of its own"
    alone = state([], num_devices=2, finished=finished, released=[0, 1])
    assert {len(action.samples) for action in feed(alone) if isinstance(action, Infer)} == {2}


def test_a_device_wanted_for_generation_is_left_alone_and_one_that_is_emptied_is_not() -> None:
    actions = feed(state([0], num_devices=2, finished={10: 2000}), [Migrate(0, 0, 1)])
    assert actions == [Release(0), Infer(0, (10,))]


def test_adaptive_gives_the_longest_sample_an_engine_of_its_own() -> None:
    policy = Adaptive(FREE_MOVES, KnownLengths(np.array([100, 5, 5])))
    moves = [one for one in policy(state([0, 0, 0], num_devices=2)) if isinstance(one, Migrate)]
    assert {(move.sample, move.target) for move in moves} in ({(1, 1), (2, 1)}, {(0, 1)})


def test_adaptive_frees_devices_when_inference_is_the_bottleneck() -> None:
    policy = Adaptive(FREE_MOVES, KnownLengths(np.full(4, 6)))
    actions = policy(state([0, 1, 2, 3], num_devices=4, finished={10 + index: 10000 for index in range(6)}))
    assert sum(isinstance(action, Migrate) for action in actions) >= 1
    assert any(isinstance(action, Infer) for action in actions)


def test_adaptive_fills_no_engine_over_its_limit() -> None:
    tight = EngineLimits(max_batch=1, kv_capacity_tokens=1000, max_new_tokens=10)
    policy = Adaptive(FREE_MOVES, KnownLengths(np.full(3, 6)))
    assert policy(state([0, 1, 2], num_devices=3, finished={10: 10**6}, limits=tight)) == []


def test_balance_is_even() -> None:
    assert balance([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert balance([1], 2) == [[0], []]
    assert balance([1, 1, 1], 2, [2.5, 0.0]) == [[], [0, 1, 2]]


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch is 0"):
        EngineLimits(max_batch=0, kv_capacity_tokens=1, max_new_tokens=1)
