"""Siblings' lengths: the formula by hand, what generated and recorded groups teach, and what rollouts gain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import PROFILES
from fuse.interstage.length_trace import read_length_trace
from fuse.interstage.lengths import LengthModel, Observation, SurvivalLengths, learn
from fuse.interstage.migration import EndedSamples, EngineLimits, LiveSamples
from fuse.interstage.rollout import Rollout
from fuse.interstage.siblings import learn_variance, log_likelihood
from fuse.interstage.simulate import simulate

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
LIMIT, SIZE = 1000, 8
ARENA = Path(__file__).parents[3] / "shared/data/lengths_arena_hard.csv"
"""500 prompts answered by each of three models, in one order."""
NONE = np.zeros(0, dtype=np.int64)


def clayton(seed: int, num_groups: int, variance: float) -> Ints:
    """Lengths of groups of SIZE, about exponential over all, with a gamma factor of this variance; 0 for none."""
    random = np.random.default_rng(seed)
    hazard = random.exponential(size=num_groups * SIZE)
    if variance:
        hazard /= np.repeat(random.gamma(1 / variance, variance, num_groups), SIZE)
        hazard = np.log1p(variance * hazard) / variance
    return np.clip(np.ceil(150 * hazard), 1, LIMIT).astype(np.int64)


def normal(seed: int, num_groups: int, correlation: float) -> Ints:
    """Log-normal lengths of groups of SIZE, whose logarithms are so correlated."""
    random = np.random.default_rng(seed)
    common = np.repeat(random.normal(size=num_groups), SIZE)
    deviation = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * random.normal(size=num_groups * SIZE)
    return np.clip(np.exp(4.8 + 0.9 * deviation), 1, LIMIT).astype(np.int64)


def model(lengths: Ints, size: int = SIZE, cut: int = LIMIT, limit: int = LIMIT) -> LengthModel:
    """Learnt from groups of so many in a row; responses over `cut` were cut there."""
    return learn(
        (
            Observation(min(tokens, cut), tokens > cut, prompt=index // size)
            for index, tokens in enumerate(lengths.tolist())
        ),
        limit,
    )


def live_samples(ids: Ints, ages: Ints | int, prompts: Ints) -> LiveSamples:
    zeros, flags = np.zeros(len(ids), dtype=np.int64), np.ones(len(ids), dtype=np.bool_)
    tokens = np.broadcast_to(np.asarray(ages, dtype=np.int64), len(ids))
    return LiveSamples(ids, zeros, zeros + 1, tokens, flags, flags, prompts)


def at_age(lengths: Ints, age: int, size: int = SIZE) -> tuple[LiveSamples, EndedSamples]:
    """A rollout of groups of so many in a row, when its live samples have this age."""
    prompts = np.arange(len(lengths)) // size
    live = np.flatnonzero(lengths > age)
    ended = np.flatnonzero(lengths <= age)
    return live_samples(live, age, prompts[live]), EndedSamples(prompts[ended], lengths[ended])


def with_variance(variance: float) -> SurvivalLengths:
    """Lengths uniform on 1..100: S(t) = 1 - t / 100, with a factor of this variance."""
    return replace(learn([], 100), variance=variance).for_samples()


def test_the_formula_by_hand() -> None:
    """With v = 1, H(t) = 1 / S(t) - 1 = t / (100 - t)."""
    # Sample 0 is 20 tokens old, a sibling 50: E = 0.25 + 1. A third is cut by the limit at H(99) = 99.
    live, lengths = live_samples(np.array([0, 1]), np.array([20, 50]), np.array([7, 7])), with_variance(1.0)
    before = lengths.given(live, EndedSamples(NONE, NONE))
    # P(length > t) = 2.25 / (2.25 + H(t) - 0.25) is a half where H(t) = 2.5: t = 250 / 3.5 = 71.4.
    assert before.quantile(np.array([0]), np.array([20]), 0.5) == pytest.approx([72 - 20])
    # One has ended within its 41st token: d = 1, E = 1.25 + 40.5 / 59.5 = 1.9307. (2.9307 / (2.6807 + H)) ** 2 = 1 / 2.
    after = lengths.given(live, EndedSamples(np.array([7]), np.array([41])))
    hazard = 2.9307 * 2**0.5 - 2.6807
    assert after.quantile(np.array([0]), np.array([20]), 0.5) == pytest.approx(
        [np.ceil(100 * hazard / (1 + hazard)) - 20]
    )
    cut = lengths.given(live, EndedSamples(np.array([7]), np.array([100])))
    # One that the limit has cut has not ended: 101.25 / (101 + H) = 1 / 2 at H = 101.5, the last token.
    assert cut.quantile(np.array([0]), np.array([20]), 0.5) == pytest.approx([80])
    # Others' siblings tell nothing.
    others = lengths.given(live, EndedSamples(np.array([3, 3]), np.array([41, 2])))
    assert others.quantile(np.array([1]), np.array([50]), 0.5) == before.quantile(np.array([1]), np.array([50]), 0.5)


@pytest.mark.parametrize("variance", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("age", [0, 30, 400])
def test_means_are_areas_under_the_curve(variance: float, age: int) -> None:
    samples = replace(model(clayton(0, 64, 1.0)), variance=variance).for_samples()
    live, ended = at_age(clayton(1, 4, 1.0), age)
    told = samples.given(live, ended)
    levels = (np.arange(2000) + 0.5) / 2000
    expected = np.mean([told.quantile(live.ids, live.response_tokens, float(level)) for level in levels], axis=0)
    assert told.expected(live.ids, live.response_tokens) == pytest.approx(expected, rel=0.04, abs=0.5)


def test_without_a_common_factor_nothing_changes() -> None:
    lengths = clayton(1, 8, 0.0)
    samples = model(clayton(0, 64, 0.0)).for_samples()
    assert not samples.variance
    assert samples.given(*at_age(lengths, 50)) is samples
    # Nor with one: of prompts with one sample each.
    samples = model(clayton(0, 64, 1.0)).for_samples()
    assert samples.variance
    assert samples.given(*at_age(lengths, 50, size=1)) is samples


def test_a_tiny_factor_is_next_to_none() -> None:
    samples = replace(model(clayton(0, 64, 0.0)), variance=1e-7).for_samples()
    live, ended = at_age(clayton(1, 8, 0.0), 50)
    told = samples.given(live, ended)
    for level in (0.1, 0.5, 0.99):
        quantiles = (one.quantile(live.ids, live.response_tokens, level) for one in (told, samples))
        assert next(quantiles) == pytest.approx(next(quantiles), abs=1)
    expected = (one.expected(live.ids, live.response_tokens) for one in (told, samples))
    assert next(expected) == pytest.approx(next(expected), rel=0.03)


@pytest.mark.parametrize("variance", [0.2, 0.5, 1.0, 3.0])
def test_the_variance_is_learnt(variance: float) -> None:
    lengths = clayton(5, 512, variance)
    assert model(lengths).variance == pytest.approx(variance, rel=0.3)
    assert model(lengths, cut=150).variance == pytest.approx(variance, rel=0.4), "responses cut at 150 count as such"
    pairs = lengths.reshape(-1, SIZE)[:, :2].astype(np.float64)
    signs = [np.sign(pairs[i] - pairs[i + 1 :]).prod(axis=1) for i in range(len(pairs))]
    assert np.concatenate(signs).mean() == pytest.approx(variance / (2 + variance), abs=0.07), "Kendall's tau"


def test_independent_lengths_have_no_factor_in_common() -> None:
    for seed in range(10):
        assert model(clayton(seed, 64, 0.0)).variance == 0
        assert model(normal(seed, 64, 0.0)).variance == 0


def test_few_groups_teach_nothing() -> None:
    lengths = clayton(0, 64, 3.0)
    assert model(lengths).variance > 0
    assert model(lengths[: 7 * SIZE]).variance == 0
    assert model(lengths, size=1).variance == 0
    assert learn_variance(np.zeros(0), np.zeros(0, dtype=np.bool_), NONE) == 0


def held_out_gain(learnt: LengthModel, lengths: Ints, size: int) -> float:
    """Log-likelihood of these groups beyond that of independent samples of the same curve."""
    survival = np.interp(np.minimum(lengths - 0.5, learnt.limit - 1), learnt.grid, learnt.curve)
    ended, groups = lengths < learnt.limit, np.arange(len(lengths)) // size
    return log_likelihood(learnt.variance, survival, ended, groups) - log_likelihood(0.0, survival, ended, groups)


def coverage(
    samples: SurvivalLengths, lengths: Ints, age: int, size: int, level: float, short: bool
) -> tuple[int, int]:
    """How many live samples of groups of which half has ended, or of others, have no more left than a quantile."""
    live, ended = at_age(lengths, age, size)
    left = samples.given(live, ended).quantile(live.ids, live.response_tokens, level)
    gone = np.bincount(ended.prompts, minlength=len(lengths) // size)[live.prompts]
    chosen = (gone >= size / 2) == short
    return int(np.count_nonzero((lengths[live.ids] - age <= left)[chosen])), int(chosen.sum())


def shares(samples: SurvivalLengths, lengths: Ints, ages: tuple[int, ...], size: int, level: float) -> list[float]:
    """The part of samples with no more left than the quantile of `level`, in short groups and in long ones."""
    found = []
    for short in (True, False):
        covered, total = np.sum([coverage(samples, lengths, age, size, level, short) for age in ages], axis=0)
        assert total > 50
        found.append(covered / total)
    return found


@pytest.mark.parametrize(
    ("draw", "strength", "tolerance"), [(clayton, 1.0, 0.08), (clayton, 3.0, 0.08), (normal, 0.5, 0.12)]
)
@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
def test_held_out_groups_are_as_long_as_their_siblings_say(
    draw: Callable[[int, int, float], Ints], strength: float, tolerance: float, level: float
) -> None:
    lengths, learnt = draw(1, 512, strength), model(draw(0, 256, strength))
    assert held_out_gain(learnt, lengths, SIZE) > 50
    samples = learnt.for_samples()
    told = shares(samples, lengths, (60, 120), SIZE, level)
    pooled = shares(replace(samples, variance=0.0), lengths, (60, 120), SIZE, level)
    assert told == pytest.approx([level, level], abs=tolerance)
    assert np.ptp(told) < np.ptp(pooled), "what is left depends on how many siblings have ended"


@pytest.mark.skipif(not ARENA.is_file(), reason="no traces in ../shared/data")
def test_recorded_answers_to_one_prompt_tell_of_each_other() -> None:
    trace = read_length_trace(ARENA)
    tokens = trace.prompt_tokens.reshape(3, -1)
    assert (tokens == tokens[0]).all()
    groups = trace.response_tokens.reshape(3, -1).T  # [prompts, answers]
    past, lengths = groups[::2].reshape(-1), groups[1::2].reshape(-1)
    learnt = model(past, size=3, limit=int(groups.max()) + 1)
    assert learnt.variance > 0.5
    assert held_out_gain(learnt, lengths, 3) > 50
    samples = learnt.for_samples()
    for level in (0.25, 0.5, 0.75):
        told = shares(samples, lengths, (250, 350, 450), 3, level)
        pooled = shares(replace(samples, variance=0.0), lengths, (250, 350, 450), 3, level)
        assert told == pytest.approx([level, level], abs=0.12)
        assert np.ptp(told) < np.ptp(pooled)


def test_earlier_epochs_tell_what_siblings_that_have_ended_do() -> None:
    """Of a prompt with three responses before, and of one with three in this rollout, to rounding."""
    others = [Observation(int(tokens), prompt=index // SIZE) for index, tokens in enumerate(clayton(0, 64, 1.0))]
    own = [30, 200, 90]
    learnt = learn([*others, *(Observation(tokens, prompt="known") for tokens in own)], LIMIT)
    samples = learnt.for_samples({0: "known", 1: "new"})
    live = live_samples(np.array([0, 1]), np.array([70, 70]), np.array([4, 5]))
    told = samples.given(live, EndedSamples(np.array([5, 5, 5]), np.array(own)))
    for level in (0.1, 0.5, 0.9):
        known, new = told.quantile(live.ids, live.response_tokens, level)
        assert known == pytest.approx(new, abs=1)
    known, new = told.expected(live.ids, live.response_tokens)
    assert known == pytest.approx(new, rel=1e-3)
    before = samples.expected(live.ids, live.response_tokens)
    assert before[0] == pytest.approx(known, rel=1e-3), "known without a rollout"
    # Both together tell more.
    more = samples.given(live, EndedSamples(np.array([4, 4, 4]), np.array([5, 5, 5])))
    assert more.expected(live.ids, live.response_tokens)[0] < 0.9 * known


def test_a_quantile_has_its_chance_whatever_is_told() -> None:
    samples = model(clayton(0, 64, 1.0)).for_samples()
    live, ended = at_age(clayton(1, 8, 1.0), 50)
    told = samples.given(live, ended)
    assert told.told is not None
    for level in (0.1, 0.5, 0.9):
        for one in (samples, told):
            beyond = one.chance(live.ids, live.response_tokens, one.quantile(live.ids, live.response_tokens, level))
            assert beyond == pytest.approx(np.full(len(live), 1 - level), abs=0.03)
    far = samples.quantile(live.ids, live.response_tokens, 0.9)
    assert np.array_equal(
        told.untold().chance(live.ids, live.response_tokens, far),
        samples.chance(live.ids, live.response_tokens, far),
    )
    gone = np.bincount(ended.prompts, minlength=8)[live.prompts]
    chances = told.chance(live.ids, live.response_tokens, far)
    assert chances[gone == gone.max()].mean() < 0.5 * chances[gone == gone.min()].mean()


@cache
def makespans(draw: Callable[[int, int, float], Ints], strength: float, seed: int) -> tuple[float, float]:
    """Seconds of a rollout of 8 groups of 8 on 4 engines, by pooled lengths and by those that siblings tell of."""
    lengths = draw(seed, 8, strength)
    case = Rollout(
        prompt_tokens=np.full(len(lengths), 200),
        response_tokens=lengths,
        num_devices=4,
        costs=PROFILES["llama-7b-h100"],
        limits=EngineLimits(max_batch=64, kv_capacity_tokens=10**6, max_new_tokens=LIMIT),
        prompts=np.arange(len(lengths)) // SIZE,
    )
    told = model(draw(99, 128, strength)).for_samples()
    pooled = replace(told, variance=0.0)
    pooled_s, told_s = (simulate(case, Adaptive(case.costs, one)).makespan_s for one in (pooled, told))
    return pooled_s, told_s


@pytest.mark.parametrize(("draw", "strength"), [(clayton, 3.0), (normal, 0.5)])
def test_rollouts_of_correlated_lengths_are_no_slower(draw: Callable[[int, int, float], Ints], strength: float) -> None:
    pooled_s, told_s = np.mean([makespans(draw, strength, seed) for seed in range(4)], axis=0)
    assert told_s <= pooled_s


def test_rollouts_of_independent_lengths_are_the_same() -> None:
    for seed in range(2):
        pooled_s, told_s = makespans(clayton, 0.0, seed)
        assert told_s == pooled_s
