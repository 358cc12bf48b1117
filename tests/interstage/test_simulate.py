"""The simulator: rollouts worked out by hand, and what holds under any policy."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import PROFILES, CostModel
from fuse.interstage.lengths import KnownLengths, learn
from fuse.interstage.migration import (
    Action,
    EngineLimits,
    Infer,
    Migrate,
    Policy,
    Release,
    RolloutState,
    Room,
    StageByStage,
    Threshold,
    free_devices,
)
from fuse.interstage.oracle import blind_bound_s, lower_bound_s
from fuse.interstage.rollout import BusySpan, Rollout, SpanKind
from fuse.interstage.simulate import simulate
from fuse.interstage.speculation import DRAFTS

SECOND_PER_STEP = CostModel(
    step_s=1.0, sample_s=0.0, context_s=0.0, prefill_s=0.0, prefill_token_s=0.0, inference_s=0.0,
    inference_token_s=0.1, kv_bytes_per_token=10, transfer_s=1.0, transfer_byte_s=0.0,
)  # fmt: skip
# As fits to noise may have it.
ONLY_SAMPLES = replace(PROFILES["small-cpu"], step_s=0.0, context_s=0.0)
ONLY_CONTEXT = replace(PROFILES["small-cpu"], step_s=0.0, sample_s=0.0, context_s=1e-4)
DRAFTING = [
    replace(costs, speculation=draft)
    for costs, draft in ((PROFILES["llama-7b-h100"], DRAFTS["int8"]), (ONLY_CONTEXT, DRAFTS["ngram"]))
]
GENERATE, INFER = SpanKind.GENERATE, SpanKind.INFER


def rollout(
    responses: Sequence[int],
    num_devices: int,
    costs: CostModel = SECOND_PER_STEP,
    *,
    prompts: Sequence[int] | None = None,
    max_batch: int = 64,
    kv_capacity_tokens: int = 10**9,
    can_transfer: bool = True,
) -> Rollout:
    return Rollout(
        prompt_tokens=np.array(prompts or [1] * len(responses), dtype=np.int64),
        response_tokens=np.array(responses, dtype=np.int64),
        num_devices=num_devices,
        costs=costs,
        limits=EngineLimits(max_batch=max_batch, kv_capacity_tokens=kv_capacity_tokens, max_new_tokens=max(responses)),
        can_transfer=can_transfer,
    )


def spans(result_spans: Sequence[BusySpan]) -> list[tuple[SpanKind, float, float]]:
    return [(span.kind, pytest.approx(span.start_s), pytest.approx(span.end_s)) for span in result_spans]


# By hand. Device 0 has responses of 10 and 4 tokens, device 1 of 2 and 6; with the prompt, 11, 5, 3 and 7 tokens.
RESPONSES = [10, 2, 4, 6]


def test_stage_by_stage_by_hand() -> None:
    result = simulate(rollout(RESPONSES, 2), StageByStage())
    assert (result.generation_s, result.num_migrations) == (10, 0)
    # Longest first: 11 | 7, then 5 with 7, then 3 with 11: the greater share is 14 tokens.
    assert result.makespan_s == pytest.approx(11.4)
    assert result.idle_share == pytest.approx(1 - (10 + 6 + 1.4 + 1.2) / (2 * 11.4))


def test_threshold_without_moves_streams_into_inference() -> None:
    result = simulate(rollout(RESPONSES, 2), Threshold(remaining=4, num_kept=2))
    assert result.makespan_s == pytest.approx(11.1)
    assert spans(result.timeline[1])[:2] == [(GENERATE, 0, 6), (INFER, 6, 7.5)]


def test_threshold_migrates_the_tail_by_hand() -> None:
    result = simulate(rollout(RESPONSES, 2), Threshold(remaining=2, num_kept=1))
    # After 4 s two are left, one per device, alike: device 0 keeps both, and device 1 scores 3 + 5 tokens at once.
    assert result.num_migrations == 1
    assert result.peak_batch == 2
    assert spans(result.timeline[1])[:3] == [(GENERATE, 0, 4), (INFER, 4, 4.8), (INFER, 6, 6.7)]
    assert result.generation_s == 10
    assert result.makespan_s == pytest.approx(11.1)


def test_messages_delay_what_is_scored_and_what_moves() -> None:
    costs = replace(SECOND_PER_STEP, hand_out_s=0.5)
    assert simulate(rollout(RESPONSES, 2, costs), StageByStage()).makespan_s == pytest.approx(11.9)
    result = simulate(rollout(RESPONSES, 2, costs), Threshold(remaining=2, num_kept=1))
    # As above, but the sample of device 1 is there after 4.5 s: with the step that starts at 5 s it has two more.
    assert spans(result.timeline[1])[:3] == [(GENERATE, 0, 4), (INFER, 4, 5.3), (INFER, 7, 8.2)]
    assert result.makespan_s == pytest.approx(11.6)


def test_recomputing_holds_up_the_target_and_transferring_only_the_sample() -> None:
    costs = replace(SECOND_PER_STEP, prefill_token_s=0.5)
    policy = Threshold(remaining=2, num_kept=1)
    # Prefill of two prompts takes 1 s, so after 5 s two samples with 1 + 4 tokens are left: recompute takes 2.5 s.
    recomputed = simulate(rollout(RESPONSES, 2, costs, can_transfer=False), policy)
    assert recomputed.generation_s == pytest.approx(11 + 2.5)
    assert recomputed.moved_bytes == 12 * 5
    transferred = simulate(rollout(RESPONSES, 2, costs), policy)
    assert transferred.generation_s == pytest.approx(11)
    assert transferred.moved_bytes == (12 + 10) * 5


def test_a_growing_context_slows_steps_down() -> None:
    costs = replace(SECOND_PER_STEP, context_s=0.01)
    result = simulate(rollout([3], 1, costs, prompts=[100]), StageByStage())
    assert result.generation_s == pytest.approx(3 + 0.01 * (100 + 101 + 102))


def test_samples_wait_for_a_place_in_the_batch() -> None:
    result = simulate(rollout([3, 3, 3], 1, max_batch=2), StageByStage())
    assert (result.generation_s, result.peak_batch) == (6, 2)


def test_samples_wait_for_kv() -> None:
    result = simulate(rollout([3, 3, 3], 1, kv_capacity_tokens=8), StageByStage())  # each reserves 1 + 3
    assert (result.generation_s, result.peak_kv_tokens) == (6, 8)


def test_the_bound_is_reached_when_the_longest_sample_is_all_there_is() -> None:
    lone = rollout([10], 1)
    assert lower_bound_s(lone) == pytest.approx(simulate(lone, StageByStage()).makespan_s)


def test_blind_bound_by_hand() -> None:
    """Of lengths 1, 2 and 4 on two devices three samples take the first step, two the second, and one the others."""
    costs = replace(SECOND_PER_STEP, sample_s=0.1, prefill_s=0.5, prefill_token_s=0.01)
    case = rollout([1, 4, 2], 2, costs, prompts=[10, 10, 10])
    assert blind_bound_s(case) == pytest.approx(0.5 + 0.15 + (1.15 + 1.1 + 1.1 + 1.1) + 1.4)
    assert lower_bound_s(case) < blind_bound_s(case) <= simulate(case, StageByStage()).makespan_s


def test_adaptive_with_lengths_known_reaches_the_bound_where_it_is_plain_to_reach() -> None:
    case = rollout(RESPONSES, 2)
    assert simulate(case, Adaptive(case.costs, KnownLengths(case.response_tokens))).makespan_s == pytest.approx(
        lower_bound_s(case)
    )


@dataclass
class Erratic:
    """Does whatever the contract allows, at random; scores something when nothing else would happen."""

    random: random.Random

    def __call__(self, state: RolloutState) -> list[Action]:
        actions: list[Action] = []
        live, room = state.live, Room(state)
        for index in range(len(live)):
            target, source = self.random.randrange(state.num_devices), int(live.devices[index])
            prompt = int(live.prompt_tokens[index])
            if live.movable[index] and target != source and self.random.random() < 0.3 and room.fits(target, prompt):
                room.move(source, target, prompt)
                actions.append(Migrate(int(live.ids[index]), source, target))
        backlog = state.finished_ids.tolist()
        self.random.shuffle(backlog)
        for device in free_devices(state, [move for move in actions if isinstance(move, Migrate)]):
            must = not len(live) and not state.inferring_tokens.any() and not any(isinstance(a, Infer) for a in actions)
            if backlog and (must or self.random.random() < 0.5):
                size = self.random.randint(1, len(backlog))
                actions += [Release(device), Infer(device, tuple(backlog[:size]))]
                del backlog[:size]
        return actions


def policies(case: Rollout, seed: int) -> dict[str, Policy]:
    unknown = learn([], case.limits.max_new_tokens).for_samples()
    return {
        "none": StageByStage(),
        "threshold": Threshold(remaining=case.num_samples // 2, num_kept=1),
        "streaming": Threshold(remaining=case.num_samples, num_kept=case.num_devices),
        "adaptive": Adaptive(case.costs, unknown, case.can_transfer),
        "known": Adaptive(case.costs, KnownLengths(case.response_tokens), case.can_transfer),
        "erratic": Erratic(random.Random(seed)),
    }


@given(
    responses=st.lists(st.integers(1, 40) | st.sampled_from([1, 40]), min_size=1, max_size=24),
    num_devices=st.integers(1, 5),
    max_batch=st.integers(1, 6),
    kv_places=st.integers(1, 8),
    costs=st.sampled_from([*PROFILES.values(), ONLY_SAMPLES, ONLY_CONTEXT, *DRAFTING]),
    can_transfer=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost_no_limit_is_passed_and_no_bound_beaten(
    responses: list[int],
    num_devices: int,
    max_batch: int,
    kv_places: int,
    costs: CostModel,
    can_transfer: bool,
    seed: int,
) -> None:
    chosen = random.Random(seed)
    prompts = [chosen.randint(1, 20) for _ in responses]
    capacity = kv_places * (max(prompts) + max(responses))
    case = rollout(
        responses, num_devices, costs, prompts=prompts, max_batch=max_batch,
        kv_capacity_tokens=capacity, can_transfer=can_transfer,
    )  # fmt: skip
    bound_s = lower_bound_s(case)
    for name, policy in policies(case, seed).items():
        result = simulate(case, policy)  # asserts that each sample gets all its tokens and is scored once
        assert result.makespan_s >= bound_s * (1 - 1e-9), name
        assert result.peak_batch <= max_batch
        assert result.peak_kv_tokens <= capacity
        assert 0 <= result.idle_share < 1
        for device_spans in result.timeline:
            for before, after in pairwise(device_spans):
                assert before.end_s <= after.start_s + 1e-9, "a device does one thing at a time"


def test_simulation_is_deterministic() -> None:
    lengths = np.random.default_rng(0).geometric(0.02, 64).tolist()
    case = rollout(lengths, 4, PROFILES["llama-7b-h100"])
    for name in policies(case, 0):
        first, second = (simulate(case, policies(case, 0)[name]) for _ in range(2))
        assert (first.makespan_s, first.timeline, first.moved_bytes) == (
            second.makespan_s,
            second.timeline,
            second.moved_bytes,
        )


@pytest.mark.parametrize(
    ("actions", "line"),
    [
        ([Infer(0, (0,))], "to infer before it is released"),
        ([Release(0)], "released with live samples"),
        ([Migrate(1, 0, 1)], "sample 1 is not on 0"),
        ([Migrate(0, 0, 1)], "engine 1 is over its batch"),
    ],
)
def test_a_policy_that_breaks_its_contract_is_caught(actions: list[Action], line: str) -> None:
    with pytest.raises(AssertionError, match=line):
        simulate(rollout([2, 2], 2, max_batch=1), lambda state: actions)


def test_a_policy_that_scores_nothing_is_caught() -> None:
    with pytest.raises(AssertionError, match="never scored"):
        simulate(rollout([2, 2], 2), lambda state: [])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_devices": 0}, "num_devices is 0"),
        ({"prompt_tokens": np.array([1])}, "1 prompts and 2 responses"),
        ({"response_tokens": np.array([1, 0])}, "less than one token"),
        ({"response_tokens": np.array([1, 9])}, "9 tokens, over max_new_tokens=2"),
        (
            {"limits": EngineLimits(max_batch=1, kv_capacity_tokens=2, max_new_tokens=2)},
            "may need 3 tokens of KV, but an engine holds 2",
        ),
    ],
)
def test_impossible_rollouts_are_refused(change: dict[str, object], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        replace(rollout([2, 2], 2), **change)  # type: ignore[arg-type]
