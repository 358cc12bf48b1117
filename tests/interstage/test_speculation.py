"""Costs of speculative decoding: against acceptance drawn token by token, and steps taken one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import PROFILES, CostModel, fastest, least
from fuse.interstage.lengths import KnownLengths
from fuse.interstage.migration import EngineLimits, StageByStage
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.speculation import DRAFTS, Speculation, expected_tokens

PLAIN = PROFILES["llama-33b-8xh800"]
INT8, NGRAM = DRAFTS["int8"], replace(DRAFTS["ngram"], acceptance=0.6)
PROMPT = 64


def with_drafts(
    draft: Speculation, *, sample_s: float = PLAIN.sample_s, context_s: float = PLAIN.context_s
) -> CostModel:
    return replace(PLAIN, speculation=draft, prefill_s=0.0, prefill_token_s=0.0, sample_s=sample_s, context_s=context_s)


def rollout(responses: Sequence[int], costs: CostModel, *, num_devices: int = 1, max_batch: int = 64) -> Rollout:
    return Rollout(
        prompt_tokens=np.full(len(responses), PROMPT),
        response_tokens=np.array(responses),
        num_devices=num_devices,
        costs=costs,
        limits=EngineLimits(max_batch=max_batch, kv_capacity_tokens=10**9, max_new_tokens=max(responses)),
    )


def step_s(costs: CostModel, batch: int, context_tokens: float, num_drafts: int, *, in_window: bool = False) -> float:
    """Of a step that drafts, as the docstring has it: the drafts one after the other, then the target."""
    draft = costs.speculation
    assert draft is not None
    read_tokens = draft.window_tokens * batch if in_window else draft.reads_context * context_tokens
    draft_s = draft.draft_share * (costs.step_s + costs.sample_s * batch) + costs.context_s * read_tokens
    target_s = costs.step_s + costs.sample_s * batch * (num_drafts + 1) + costs.context_s * context_tokens
    return num_drafts * draft_s + target_s


def best_drafts(costs: CostModel, batch: int, context_tokens: float) -> tuple[int, bool, float]:
    """The number of drafts with the least seconds per token, whether they read a window, and these seconds."""
    draft = costs.speculation
    assert draft is not None
    found = []
    for in_window in (False, True) if draft.window_tokens else (False,):
        acceptance = draft.acceptance * (draft.window_share if in_window else 1)
        for count in range(draft.max_drafts + 1):
            seconds = step_s(costs, batch, context_tokens, count, in_window=in_window)
            found.append((seconds / sum(acceptance**place for place in range(count + 1)), count, in_window))
    seconds, count, in_window = min(found)
    return count, in_window, seconds


def drawn_tokens(random: np.random.Generator, acceptance: float, num_drafts: int, num_steps: int) -> NDArray[np.int64]:
    """Tokens that steps bring: drafts up to the first wrong one, and one more."""
    right = random.random((num_steps, num_drafts)) < acceptance
    tokens: NDArray[np.int64] = 1 + np.cumprod(right, axis=1).sum(axis=1)
    return tokens


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.97, 1.0])
@pytest.mark.parametrize("num_drafts", [0, 1, 4, 8])
def test_expected_tokens_are_the_mean_of_drawn_ones(acceptance: float, num_drafts: int) -> None:
    drawn = drawn_tokens(np.random.default_rng(0), acceptance, num_drafts, 20_000)
    error = drawn.std() / np.sqrt(len(drawn))
    expected = expected_tokens(acceptance, num_drafts)
    assert expected == pytest.approx(drawn.mean(), abs=4 * error + 1e-12)
    if acceptance < 1:
        assert expected == pytest.approx((1 - acceptance ** (num_drafts + 1)) / (1 - acceptance))


@pytest.mark.parametrize(
    "draft",
    [INT8, NGRAM, replace(INT8, acceptance=0.7), replace(INT8, acceptance=0.0), replace(INT8, window_tokens=0)],
)
def test_steps_have_the_best_number_of_drafts(draft: Speculation) -> None:
    costs, chosen, windows = with_drafts(draft), set(), set()
    for batch in (1, 2, 7, 40, 300, 3000):
        for context_tokens in (batch, 500 * batch, 40_000 * batch):
            count, in_window, seconds = best_drafts(costs, batch, context_tokens)
            assert costs.decode_step(batch, context_tokens) == pytest.approx(seconds)
            best = draft.best(costs.plain_step, batch, context_tokens)
            assert best.num_drafts == count
            if count:
                assert best.acceptance == draft.acceptance * (draft.window_share if in_window else 1)
                windows.add(in_window)
            found = fastest(costs, lambda one: np.array([one.step_s, one.sample_s, one.context_s]))
            bound = least(costs)
            assert found == pytest.approx([bound.step_s, bound.sample_s, bound.context_s])
            assert bound.decode_step(batch, context_tokens) <= seconds * (1 + 1e-9)
            chosen.add(count)
    assert 0 in chosen
    assert (len(chosen) > 1) == (draft.acceptance > 0)
    assert (len(windows) == 2) == (draft.window_tokens > 0 and draft.acceptance > 0)


def test_context_that_costs_next_to_nothing_changes_no_choice() -> None:
    assert with_drafts(INT8, context_s=1e-320).num_alike_steps(1, 10) > 10**9


def test_drafts_that_are_never_right_change_nothing() -> None:
    responses = np.random.default_rng(0).geometric(0.02, 48).tolist()
    for draft in (INT8, NGRAM):
        never = replace(PLAIN, speculation=replace(draft, acceptance=0.0))
        assert [one.step_s for one in never.choices] == [PLAIN.step_s]
        results = [
            simulate(rollout(responses, costs, num_devices=4), Adaptive(costs, KnownLengths(np.array(responses))))
            for costs in (PLAIN, never)
        ]
        assert results[0] == results[1]


def test_more_acceptance_is_never_slower() -> None:
    random = np.random.default_rng(0)
    for draft in (INT8, NGRAM):
        responses = (1 + random.exponential(400, 60)).astype(int).tolist()
        seconds = [
            simulate(
                rollout(responses, with_drafts(replace(draft, acceptance=acceptance)), num_devices=3, max_batch=8),
                StageByStage(),
            ).makespan_s
            for acceptance in np.linspace(0, 1, 11)
        ]
        assert np.all(np.diff(seconds) <= 1e-9)
        assert seconds[-1] < 0.7 * seconds[0]


@pytest.mark.parametrize(("draft", "context_s"), [(INT8, 1e-5), (NGRAM, 1e-5), (NGRAM, 1e-7)])
def test_the_simulator_takes_the_time_of_tokens_one_by_one(draft: Speculation, context_s: float) -> None:
    """A batch that shrinks and is filled up, and in which other numbers of drafts pay as its context grows."""
    costs = with_drafts(draft, context_s=context_s, sample_s=2e-4)
    responses, max_batch = [700, 20, 350, 90, 410, 15, 900, 60], 5
    waiting = list(range(len(responses)))
    ages: dict[int, int] = {}
    now_s, switched, before = 0.0, 0, (0, 0)
    while waiting or ages:
        while waiting and len(ages) < max_batch:
            ages[waiting.pop(0)] = 0
        count, _, seconds = best_drafts(costs, len(ages), sum(PROMPT + age for age in ages.values()))
        switched += before[0] == len(ages) and before[1] != count
        before, now_s = (len(ages), count), now_s + seconds
        ages = {sample: age + 1 for sample, age in ages.items() if age + 1 < responses[sample]}
    result = simulate(rollout(responses, costs, max_batch=max_batch), StageByStage())
    assert result.generation_s == pytest.approx(now_s, rel=1e-9)
    assert switched > 0 or context_s < 1e-6


@pytest.mark.parametrize("responses", [[3000], [400 + 90 * index for index in range(12)]])
def test_the_simulator_takes_about_the_time_of_drawn_acceptance(responses: list[int]) -> None:
    """Whole steps, in which samples are lucky or not; a response that ends leaves its last drafts unused."""
    costs = with_drafts(replace(INT8, acceptance=0.9), sample_s=2e-4)
    seconds = []
    for seed in range(6):
        random, now_s = np.random.default_rng(seed), 0.0
        lengths, ages = np.array(responses), np.zeros(len(responses), dtype=int)
        while (live := ages < lengths).any():
            batch, context_tokens = int(live.sum()), int((PROMPT + ages[live]).sum())
            count, in_window, _ = best_drafts(costs, batch, context_tokens)
            now_s += step_s(costs, batch, context_tokens, count, in_window=in_window)
            ages[live] += drawn_tokens(random, 0.9 * (INT8.window_share if in_window else 1), count, batch)
        seconds.append(now_s)
    result = simulate(rollout(responses, costs), StageByStage())
    assert result.generation_s == pytest.approx(np.mean(seconds), rel=0.02)
    plain = simulate(rollout(responses, replace(costs, speculation=None)), StageByStage())
    assert result.generation_s < 0.92 * plain.generation_s


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"acceptance": -0.1}, "acceptance is -0.1: a chance is 0 to 1"),
        ({"draft_share": 2.0}, "draft_share is 2.0"),
        ({"window_tokens": -1}, "window_tokens is -1: a window has 0 to"),
        ({"max_drafts": 0}, "max_drafts is 0: draft 1 to 64"),
    ],
)
def test_impossible_drafts_are_refused(change: dict[str, float], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        replace(INT8, **change)  # type: ignore[arg-type]
