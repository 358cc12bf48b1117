"""The adaptive policy on generated mixes of lengths: never far behind a tuned threshold, pure, and fed evenly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import PROFILES
from fuse.interstage.lengths import Observation, SurvivalLengths, learn
from fuse.interstage.migration import Action, EngineLimits, RolloutState, StageByStage
from fuse.interstage.oracle import blind_bound_s
from fuse.interstage.rollout import Rollout, SpanKind
from fuse.interstage.simulate import simulate
from fuse.interstage.tuning import LengthHistory, tune_threshold

from ..examples import examples

Ints = NDArray[np.int64]
LONGEST, NUM_BATCHES, NUM_PAST = 1000, examples(2), 1000
MIXES: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "uniform": lambda random, size: random.uniform(1, LONGEST, size),
    "exponential": lambda random, size: random.exponential(120, size),
    "heavy tail": lambda random, size: 60 * (1 + random.pareto(1.3, size)),
    "two kinds": lambda random, size: np.where(random.random(size) < 0.1, 800, 60) * random.uniform(0.8, 1.2, size),
    "alike": lambda random, size: random.normal(300, 20, size),
}
SETTINGS = [(2, 64, "small-cpu"), (8, 128, "llama-33b-8xh800"), (16, 64, "llama-7b-h100")]


def lengths_of(mix: str, seed: int, size: int) -> Ints:
    return np.clip(MIXES[mix](np.random.default_rng(seed), size).round(), 1, LONGEST).astype(np.int64)


def rollout(mix: str, seed: int, num_devices: int, num_samples: int, profile: str) -> Rollout:
    return Rollout(
        prompt_tokens=np.full(num_samples, 200),
        response_tokens=lengths_of(mix, seed, num_samples),
        num_devices=num_devices,
        costs=PROFILES[profile],
        limits=EngineLimits(max_batch=64, kv_capacity_tokens=10**6, max_new_tokens=LONGEST),
    )


def adaptive(mix: str, case: Rollout) -> Adaptive:
    past = [Observation(int(tokens)) for tokens in lengths_of(mix, 99, NUM_PAST)]
    return Adaptive(case.costs, learn(past, LONGEST).for_samples(), case.can_transfer)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_adaptive_keeps_up_with_a_tuned_threshold(mix: str, setting: tuple[int, int, str]) -> None:
    cases = [rollout(mix, seed, *setting) for seed in range(NUM_BATCHES)]
    history = LengthHistory(prompt_tokens=np.full(NUM_PAST, 200), response_tokens=lengths_of(mix, 99, NUM_PAST))
    threshold = tune_threshold(
        history, num_samples=cases[0].num_samples, num_devices=cases[0].num_devices, costs=cases[0].costs,
        limits=cases[0].limits, remaining_shares=(0.1, 0.4), kept_shares=(0.25, 0.5, 1.0),
    )  # fmt: skip
    seconds = {
        "none": sum(simulate(case, StageByStage()).makespan_s for case in cases),
        "threshold": sum(simulate(case, threshold).makespan_s for case in cases),
        "adaptive": sum(simulate(case, adaptive(mix, case)).makespan_s for case in cases),
    }
    assert seconds["adaptive"] <= 1.02 * seconds["threshold"]
    assert seconds["adaptive"] <= 1.01 * seconds["none"]
    assert seconds["adaptive"] >= 0.99 * sum(blind_bound_s(case) for case in cases)


def test_decisions_follow_from_the_state_alone_and_leave_it_as_it_was() -> None:
    case = rollout("exponential", 0, 4, 64, "llama-7b-h100")
    policy, num_actions = adaptive("exponential", case), 0

    def checked(state: RolloutState) -> list[Action]:
        nonlocal num_actions
        arrays = [state.live.ids, state.live.devices, state.live.response_tokens, state.finished_tokens, state.released]
        before = [array.copy() for array in arrays]
        actions = policy(state)
        assert actions == adaptive("exponential", case)(state)
        assert all(np.array_equal(*pair) for pair in zip(arrays, before, strict=True))
        num_actions += len(actions)
        return actions

    assert simulate(case, checked).makespan_s == simulate(case, policy).makespan_s
    assert num_actions


def test_devices_score_to_a_common_end_in_few_pieces() -> None:
    """All are finished at once: what came before is counted, and each device gets the rest of its share at once."""
    case = rollout("alike", 0, 4, 64, "small-cpu")
    case = replace(
        case, response_tokens=np.full(64, 50), prompt_tokens=np.random.default_rng(0).integers(100, 9000, 64)
    )
    result = simulate(case, adaptive("alike", case))
    scored = [[span for span in spans if span.kind is SpanKind.INFER] for spans in result.timeline]
    ends_s = [spans[-1].end_s for spans in scored]
    assert max(ends_s) - min(ends_s) <= case.costs.inference(9050)
    assert result.num_inferences <= 2 * case.num_devices
    assert result.idle_share < 0.02


def grouped(seed: int) -> tuple[Rollout, dict[str, SurvivalLengths]]:
    """16 groups of 8 of an exponential's lengths with a common factor, and prompts far longer than they are; and what
    is known of them: nothing, siblings, and an earlier epoch of the same prompts, too.
    """
    random, num_groups, size, variance = np.random.default_rng(seed), 16, 8, 1.5
    prompt_tokens = np.repeat(random.integers(200, 12_000, num_groups), size)

    def lengths(factors: NDArray[np.float64]) -> Ints:
        drawn = 150 * random.exponential(1, (len(factors), size)) / factors[:, None]
        return np.clip(drawn, 1, LONGEST).round().astype(np.int64)

    others, factors = (np.maximum(random.gamma(1 / variance, variance, n), 0.02) for n in (200, num_groups))
    observed = [Observation(tokens, prompt=(g,)) for g, row in enumerate(lengths(others).tolist()) for tokens in row]
    earlier = [Observation(tokens, prompt=g) for g, row in enumerate(lengths(factors).tolist()) for tokens in row]
    numbers = np.repeat(np.arange(num_groups), size)
    case = Rollout(
        prompt_tokens=prompt_tokens, response_tokens=lengths(factors).reshape(-1), num_devices=16,
        costs=PROFILES["llama-33b-8xh800"], prompts=numbers,
        limits=EngineLimits(max_batch=64, kv_capacity_tokens=10**7, max_new_tokens=LONGEST),
    )  # fmt: skip
    siblings = learn(observed, LONGEST).for_samples()
    history = learn([*observed, *earlier], LONGEST).for_samples(dict(enumerate(numbers.tolist())))
    return case, {"pooled": replace(siblings, variance=0.0), "siblings": siblings, "history": history}


def test_what_siblings_tell_makes_no_rollout_slower() -> None:
    seconds = dict.fromkeys(("pooled", "siblings", "history"), 0.0)
    for seed in range(6):
        case, known = grouped(seed)
        for name, lengths in known.items():
            seconds[name] += simulate(case, Adaptive(case.costs, lengths)).makespan_s
    assert seconds["siblings"] <= seconds["pooled"]
    assert seconds["history"] <= seconds["pooled"]
