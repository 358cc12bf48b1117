"""Siblings start on one engine, which computes their prompt once, where costs say so; numbers are even anyway."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import SMALL_CPU, CostModel
from fuse.interstage.dealing import Dealing, deal, prompt_numbers
from fuse.interstage.lengths import learn
from fuse.interstage.migration import EngineLimits, Policy, StageByStage
from fuse.interstage.oracle import lower_bound_s
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.sample import Sample

FREE_PREFILL = replace(SMALL_CPU, prefill_s=0.0, prefill_token_s=0.0)


def dealt(prompts: Sequence[Hashable], num_engines: int, *, tokens: int = 100, **options: Any) -> list[int]:
    engines: list[int] = deal(prompts, [tokens] * len(prompts), num_engines, **options).tolist()
    return engines


def test_samples_without_siblings_go_round() -> None:
    for costs in (None, SMALL_CPU):
        assert dealt(range(7), 3, costs=costs) == [0, 1, 2, 0, 1, 2, 0]


def test_groups_stay_whole_and_what_is_uneven_is_split() -> None:
    assert dealt("aabbccdd", 2) == [0, 0, 1, 1, 0, 0, 1, 1]
    assert dealt("abcabc", 3) == [0, 1, 2, 0, 1, 2]
    assert dealt("aaaabbbbcccc", 2) == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    assert dealt("aaaaa", 3) == [0, 0, 1, 1, 2]


def test_costs_say_whether_a_group_is_split() -> None:
    options: dict[str, Any] = {"costs": SMALL_CPU, "response_tokens": 100.0, "is_evened_out": True}
    short, long = (dealt("aaaabbbbcccc", 2, tokens=tokens, **options) for tokens in (100, 10_000))
    assert sorted(np.bincount(short)) == [6, 6]
    assert sorted(np.bincount(long)) == [4, 8], "the prompt costs more than two samples too many"
    assert all(len(set(long[first : first + 4])) == 1 for first in (0, 4, 8))


def test_costs_say_whether_siblings_are_side_by_side() -> None:
    """Where a prompt is as good as free, evening out lengths counts; where samples are moved, less."""
    groups, together, apart = "aabbccdd", [0, 0, 1, 1, 0, 0, 1, 1], [0, 1] * 4
    assert dealt(groups, 2, costs=FREE_PREFILL, response_tokens=100.0) == apart
    assert dealt(groups, 2, costs=SMALL_CPU, tokens=2000, response_tokens=10.0) == together
    options: dict[str, Any] = {"costs": SMALL_CPU, "tokens": 200, "response_tokens": 800.0}
    assert dealt(groups, 2, **options) == apart
    assert dealt(groups, 2, **options, is_evened_out=True) == together


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 6), st.booleans())
def test_every_sample_is_dealt_and_few_prompts_are_on_two_engines(
    sizes: Sequence[int], num_engines: int, is_shuffled: bool
) -> None:
    prompts = [number for number, size in enumerate(sizes) for _ in range(size)]
    if is_shuffled:
        np.random.default_rng(0).shuffle(prompts)
    engines = dealt(prompts, num_engines)
    counts = np.bincount(engines, minlength=num_engines)
    assert counts.max() - counts.min() <= 1
    if len(sizes) < len(prompts):
        assert len(set(zip(prompts, engines, strict=True))) <= len(sizes) + num_engines - 1


def test_shares_are_of_samples_with_the_same_prompt() -> None:
    samples = [Sample(index, (1, index // 3)) for index in range(6)]
    assert Dealing().shares(samples, 2) == [samples[:3], samples[3:]]
    assert prompt_numbers(["x", None, "y", "x", None]).tolist() == [0, 1, 2, 0, 3]


def grouped(num_devices: int, *, is_grouped: bool = True, costs: CostModel = SMALL_CPU) -> Rollout:
    lengths = np.random.default_rng(0).integers(5, 60, 24)
    return Rollout(
        prompt_tokens=np.full(24, 500),
        response_tokens=lengths,
        num_devices=num_devices,
        costs=costs,
        limits=EngineLimits(max_batch=64, kv_capacity_tokens=10**6, max_new_tokens=60),
        prompts=np.repeat(np.arange(6), 4) if is_grouped else None,
    )


@pytest.mark.parametrize("policy", [StageByStage(), Adaptive(SMALL_CPU, learn([], 60).for_samples())])
def test_the_simulator_charges_a_shared_prompt_once(policy: Policy) -> None:
    """Siblings of two engines' worth of groups: every prompt once, where it was 24 times."""
    alone, shared = simulate(grouped(2, is_grouped=False), policy), simulate(grouped(2), policy)
    assert alone.prefill_tokens >= 24 * 500
    recomputed = shared.num_migrations * 560
    assert 6 * 500 <= shared.prefill_tokens <= 6 * 500 + recomputed
    assert shared.makespan_s < alone.makespan_s
    assert lower_bound_s(grouped(2)) <= shared.makespan_s


def test_a_prompt_is_computed_again_once_no_sibling_has_it() -> None:
    """One place in the batch: each sibling comes when the one before has gone."""
    case = replace(grouped(2), limits=EngineLimits(max_batch=1, kv_capacity_tokens=10**6, max_new_tokens=60))
    assert simulate(case, StageByStage()).prefill_tokens == 24 * 500
