"""Remaining lengths: the curves of textbooks, means and quantiles by brute force, and what a prompt's past adds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.interstage.lengths import KnownLengths, Observation, drift, kaplan_meier, learn

NO_IDS = np.array([0])


def ages(*values: int) -> np.ndarray:
    return np.array(values)


def test_a_censored_sample_counts_until_it_was_cut() -> None:
    # Of three, one ends at 1 and one is cut at 2: the two thirds that are left are those of the one that ends at 3.
    curve = kaplan_meier(np.array([1, 2, 3]), np.array([False, True, False]), 4, prior=0.0)
    assert curve == pytest.approx([1, 2 / 3, 2 / 3, 0, 0])


def test_without_observations_lengths_are_uniform() -> None:
    model = learn([], 10).for_samples()
    assert model.expected(NO_IDS, ages(0)) == pytest.approx([5.5])
    assert model.quantile(NO_IDS, ages(4), 0.5) == pytest.approx([3.0])


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=20),
    st.integers(0, 29),
    st.floats(0.05, 0.95),
)
def test_means_and_quantiles_are_those_of_the_curve(lengths: list[tuple[int, bool]], age: int, level: float) -> None:
    limit = 30
    observations = [Observation(tokens, censored) for tokens, censored in lengths]
    model = learn(observations, limit)
    survival = kaplan_meier(
        np.array([tokens for tokens, _ in lengths]),
        np.array([censored and tokens < limit for tokens, censored in lengths]),
        limit,
    )
    assert np.all(np.diff(survival) <= 0)
    conditional = survival[age:] / survival[age]
    samples = model.for_samples()
    assert samples.expected(NO_IDS, ages(age)) == pytest.approx([max(1.0, conditional.sum())])
    reached = int(np.argmax(survival[age:] <= survival[age] * (1 - level) + 1e-12))
    assert samples.quantile(NO_IDS, ages(age), level) == pytest.approx([max(1, reached)])


def test_long_limits_are_interpolated_closely() -> None:
    random = np.random.default_rng(0)
    lengths = np.minimum(32768, np.exp(random.normal(6.5, 1.2, 4000))).astype(int) + 1
    model = learn([Observation(int(tokens)) for tokens in lengths], 32769).for_samples()
    for age in (0, 500, 5000):
        left = lengths[lengths > age] - age
        assert model.expected(NO_IDS, ages(age))[0] == pytest.approx(left.mean(), rel=0.05)
        assert model.quantile(NO_IDS, ages(age), 0.9)[0] == pytest.approx(np.quantile(left, 0.9), rel=0.05, abs=33)


def test_the_past_of_a_prompt_counts_more_as_it_grows() -> None:
    """Half of the prompts have short responses, half of them long ones."""
    drawn = np.random.default_rng(0).integers(0, 20, (60, 4)) + np.array([1, 60] * 30)[:, None]
    pool = [Observation(tokens, prompt=group) for group, own in enumerate(drawn.tolist()) for tokens in own]
    means = []
    for seen in (0, 1, 4, 40):
        model = learn([*pool, *[Observation(75, prompt="long")] * seen], 100)
        samples = model.for_samples({7: "long", 8: "never seen"})
        mean, unseen = samples.expected(np.array([7, 8]), ages(0, 0))
        assert unseen == pytest.approx(samples.expected(np.array([999]), ages(0))[0])
        means.append(mean)
    assert means == sorted(means)
    assert means[0] < 50
    assert means[3] > 60
    assert samples.quantile(np.array([7]), ages(0), 0.5) > 60


def test_the_past_of_a_prompt_says_nothing_where_lengths_have_nothing_in_common() -> None:
    drawn = np.random.default_rng(0).integers(1, 101, (250, 4)).tolist()
    past = [Observation(tokens, prompt=group) for group, own in enumerate(drawn) for tokens in own]
    samples = learn([*past, *[Observation(3, prompt="short")] * 4], 100).for_samples({0: "short"})
    for age in (0, 30, 85):
        for level in (0.2, 0.5, 0.9):
            own, unseen = samples.quantile(np.array([0, 1]), ages(age, age), level)
            assert own == unseen
        own, unseen = samples.expected(np.array([0, 1]), ages(age, age))
        assert own == unseen


def test_drift_tells_a_shift_from_chance() -> None:
    random = np.random.default_rng(0)
    model = learn([Observation(int(tokens)) for tokens in random.geometric(0.02, 4000)], 400)
    same = [Observation(int(tokens)) for tokens in random.geometric(0.02, 256)]
    longer = [Observation(int(tokens)) for tokens in random.geometric(0.01, 256)]
    cut = [Observation(min(one.tokens, 60), one.tokens > 60) for one in same]
    assert drift(model, same) < 1
    assert drift(model, cut) < 1.2  # cut samples are not taken for short ones
    assert drift(model, longer) > 1.5
    assert drift(model, []) == 0


def test_known_lengths_leave_no_doubt() -> None:
    known = KnownLengths(np.array([5, 9]))
    assert known.quantile(np.array([1, 0]), ages(4, 4), 0.01).tolist() == [5, 1]
    assert known.quantile(np.array([1, 0]), ages(4, 4), np.full((2, 2), 0.01)).tolist() == [[5, 1]] * 2


def test_several_draws_are_those_drawn_one_by_one() -> None:
    random = np.random.default_rng(0)
    observed = [Observation(int(tokens), prompt=index % 3) for index, tokens in enumerate(random.geometric(0.05, 60))]
    lengths = learn(observed, 100).for_samples({0: 0, 2: 1, 5: 7})
    ids, levels = np.arange(6), random.random((3, 6))
    each = [lengths.quantile(ids, 3 * ids, level) for level in levels]
    assert (lengths.quantile(ids, 3 * ids, levels) == np.stack(each)).all()


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="0 tokens was observed"):
        Observation(0)
    with pytest.raises(ValueError, match="limit is 0"):
        learn([], 0)
