"""GRPOVI's closed form: by hand, against both algorithms of the paper, and in what the paper proves of it."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fuse.algorithms.grpovi import increase_variance

NAN = math.nan


def adjust(rewards: list[float], logprobs: list[float], reward_range: tuple[float, float] | None = None) -> list[float]:
    """One group, in double precision."""
    arguments = torch.tensor(rewards, dtype=torch.float64), torch.tensor(logprobs, dtype=torch.float64)
    return increase_variance(*arguments, len(rewards), reward_range=reward_range).tolist()


def softmax(logprobs: list[float]) -> list[float]:
    return torch.tensor(logprobs, dtype=torch.float64).softmax(0).tolist()


# The two algorithms as the paper prints them, for rewards in descending order.


def extreme_point(
    k: int, last: int, p: list[float], r: list[float], m: float, M: float
) -> tuple[list[float], float] | None:
    """Lemma 2: M k times, alpha for k < i <= last, then m, and its objective; None if it breaks a constraint."""
    expectation = math.fsum(q * x for q, x in zip(p, r, strict=True))
    middle = math.fsum(p[k:last])
    if middle <= 0:
        return None
    alpha = (expectation - M * math.fsum(p[:k]) - m * math.fsum(p[last:])) / middle
    if not m - 1e-12 <= alpha <= M + 1e-12:
        return None
    z = [M] * k + [alpha] * (last - k) + [m] * (len(p) - last)
    return z, math.fsum(q * x * x for q, x in zip(p, z, strict=True))


def enumeration(p: list[float], r: list[float], m: float, M: float) -> tuple[list[float], float]:
    """Algorithm 1: every extreme point."""
    points = (extreme_point(k, last, p, r, m, M) for k, last in combinations_with_replacement(range(len(p) + 1), 2))
    return max((point for point in points if point is not None), key=lambda point: point[1])


def one_pass(p: list[float], r: list[float], m: float, M: float) -> tuple[list[float], float]:
    """Algorithm 2: from one block, raise its first or lower its last, whichever gains more, while one gains."""
    k, last = 0, len(p)
    best = extreme_point(k, last, p, r, m, M)
    assert best is not None
    while True:
        moves = [(k + 1, last), (k, last - 1)] if last - k > 1 else []
        candidates = [(point, move) for move in moves if (point := extreme_point(*move, p, r, m, M)) is not None]
        if not candidates:
            return best
        point, move = max(candidates, key=lambda candidate: candidate[0][1])
        if point[1] <= best[1]:
            return best
        best, (k, last) = point, move


def test_uniform_probabilities_by_hand() -> None:
    # The sum is 3.8: three become 1, one 0.8.
    rewards = [0.9, 0.8, 0.55, 0.5, 0.45, 0.3, 0.2, 0.1]
    assert adjust(rewards, [0.0] * 8, (0, 1)) == pytest.approx([1, 1, 1, 0.8, 0, 0, 0, 0])


def test_two_groups_with_ranges_of_their_own_by_hand() -> None:
    # Weights 1/2, 1/4, 1/4, in the range [-1, 3]: both ends are reached already, and the middle keeps the expectation.
    # The second group is turned round.
    logprobs = torch.tensor([0.5, 0.25, 0.25, 0.25, 0.25, 0.5]).log()
    rewards = torch.tensor([3.0, 0.0, -1.0, -1.0, 0.0, 3.0])
    assert increase_variance(rewards, logprobs, 3).tolist() == [3, 0, -1, -1, 0, 3]
    wider = increase_variance(rewards, logprobs, 3, reward_range=(-2.0, 4.0))
    # In [-2, 4]: 1/2 z - 2/4 - 2/4 = 1.25, the expectation, for z = 4.5, too large. So 4, and 2 + 1/4 z - 2/4 = 1.25.
    torch.testing.assert_close(wider, torch.tensor([4.0, -1.0, -2.0, -2.0, -1.0, 4.0]))


def test_equal_rewards_are_adjusted_alike() -> None:
    assert adjust([0.5, 1.0, 0.5, 0.0], [0.0] * 4, (0, 1)) == pytest.approx([0.5, 1, 0.5, 0])
    assert adjust([0.75, 0.75, 0.0, 0.0], [0.0] * 4, (0, 1)) == pytest.approx([0.75, 0.75, 0, 0])


def test_a_group_of_equal_rewards_stays_as_it_is() -> None:
    assert adjust([0.3, 0.3, 0.3], [-5.0, 0.0, -1.0]) == [0.3] * 3
    assert adjust([1.0, 1.0], [-5.0, 0.0], (0, 1)) == [1, 1]
    assert adjust([0.0, 0.0], [-5.0, 0.0], (0, 1)) == [0, 0]


def test_a_missing_reward_stays_missing_and_counts_for_nothing() -> None:
    with_missing = adjust([0.2, NAN, 0.9, 0.5], [-1.0, 50.0, -2.0, -3.0], (0, 1))
    assert math.isnan(with_missing[1])
    assert [with_missing[index] for index in (0, 2, 3)] == adjust([0.2, 0.9, 0.5], [-1.0, -2.0, -3.0], (0, 1))
    assert adjust([0.2, NAN, 0.9], [-1.0, NAN, -2.0])[::2] == [0.2, 0.9]
    assert all(math.isnan(value) for value in adjust([NAN, NAN], [0.0, 0.0]))
    assert all(math.isnan(value) for value in adjust([NAN, NAN], [0.0, 0.0], (0, 1)))


@pytest.mark.parametrize("gap", [1.0, 40.0, 800.0, 20_000.0])
@pytest.mark.parametrize("binary", [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
def test_binary_rewards_are_left_alone_however_unlikely_a_response_is(binary: list[float], gap: float) -> None:
    """Probabilities of long responses differ by more than floating point holds."""
    logprobs = [-gap * index for index in range(4)]
    assert adjust(binary, logprobs, (0, 1)) == binary
    assert adjust(binary, logprobs[::-1]) == binary


def test_float32_rewards_and_log_probabilities_of_long_responses() -> None:
    rewards = torch.tensor([0.7, 0.1, 0.4])
    adjusted = increase_variance(rewards, torch.tensor([-9000.0, -4000.0, -1000.0]), 3, reward_range=(0.0, 1.0))
    assert adjusted.dtype == torch.float32
    torch.testing.assert_close(adjusted, torch.tensor([1.0, 0.0, 0.4]))  # the third has all the weight


groups = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.floats(0, 1, allow_subnormal=False) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n
        ),
        st.lists(st.floats(-20, 0), min_size=n, max_size=n),
    )
)
skewed_groups = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(
            st.floats(0, 1, allow_subnormal=False) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n
        ),
        st.lists(st.floats(-2000, 0), min_size=n, max_size=n),
    )
)


def merged(rewards: list[float], p: list[float]) -> tuple[list[float], list[float]]:
    """Probabilities and rewards, descending, of equal rewards together."""
    masses: dict[float, float] = {}
    for reward, probability in sorted(zip(rewards, p, strict=True), reverse=True):
        masses[reward] = masses.get(reward, 0.0) + probability
    return list(masses.values()), list(masses)


@settings(max_examples=8 * settings.default.max_examples)
@given(group=groups)
@example(group=([0.0, 6.103515625e-05, 0.0, 0.84375, 1.0, 0.25], [-12.0, -2.0, -13.0, -9.0, 0.0, -10.0]))
def test_is_the_best_extreme_point_and_no_worse_than_one_pass(group: tuple[list[float], list[float]]) -> None:
    rewards, logprobs = group
    p, r = merged(rewards, softmax(logprobs))
    ours = dict(zip(rewards, adjust(rewards, logprobs, (0, 1)), strict=True))
    objective = sum(q * ours[reward] ** 2 for q, reward in zip(p, r, strict=True))
    assert objective == pytest.approx(enumeration(p, r, 0.0, 1.0)[1], abs=1e-9)
    assert objective >= one_pass(p, r, 0.0, 1.0)[1] - 1e-9  # which may stop where neither move alone gains


def test_equals_the_points_that_the_algorithms_find() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rewards = torch.rand(12, generator=generator, dtype=torch.float64).sort(descending=True).values.tolist()
        logprobs = (3 * torch.randn(12, generator=generator, dtype=torch.float64)).tolist()
        expected = pytest.approx(adjust(rewards, logprobs, (-0.5, 1.5)), abs=1e-9)
        for algorithm in (enumeration, one_pass):
            assert algorithm(softmax(logprobs), rewards, -0.5, 1.5)[0] == expected


@settings(max_examples=8 * settings.default.max_examples)
@given(group=groups | skewed_groups)
def test_keeps_expectation_and_order_and_never_lowers_the_variance(group: tuple[list[float], list[float]]) -> None:
    rewards, logprobs = group
    p, adjusted = softmax(logprobs), adjust(rewards, logprobs, (0, 1))

    def expectation(values: list[float]) -> float:
        return math.fsum(q * value for q, value in zip(p, values, strict=True))

    assert expectation(adjusted) == pytest.approx(expectation(rewards), abs=1e-12)
    squares = [[value**2 for value in values] for values in (adjusted, rewards)]
    assert expectation(squares[0]) >= expectation(squares[1]) - 1e-12
    assert all(
        (adjusted[i] == adjusted[j]) if rewards[i] == rewards[j] else (adjusted[i] >= adjusted[j])
        for i in range(len(rewards))
        for j in range(len(rewards))
        if rewards[i] >= rewards[j]
    )


@settings(max_examples=8 * settings.default.max_examples)
@given(group=groups | skewed_groups)
def test_has_at_most_one_value_inside_the_range(group: tuple[list[float], list[float]]) -> None:
    assert len({value for value in adjust(*group, (0, 1)) if value not in (0.0, 1.0)}) <= 1


@settings(max_examples=3 * settings.default.max_examples)
@given(group=groups, data=st.data())
def test_does_not_depend_on_the_order_of_samples(group: tuple[list[float], list[float]], data: st.DataObject) -> None:
    rewards, logprobs = group
    order = data.draw(st.permutations(range(len(rewards))))
    permuted = adjust([rewards[index] for index in order], [logprobs[index] for index in order], (0, 1))
    assert permuted == pytest.approx([adjust(rewards, logprobs, (0, 1))[index] for index in order], abs=1e-12)


def test_groups_do_not_know_of_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, logprobs = torch.rand(40, generator=generator), -10 * torch.rand(40, generator=generator)
    alone = [increase_variance(rewards[i : i + 8], logprobs[i : i + 8], 8) for i in range(0, 40, 8)]
    assert torch.equal(increase_variance(rewards, logprobs, 8), torch.cat(alone))


class Operations(TorchDispatchMode):
    """Counts what torch is asked for, and the most elements that one operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_takes_one_sort_and_scans_whatever_the_size() -> None:
    """So O(n log n): the number of operations does not depend on n, and all but the sort go once over n elements."""
    counted = {}
    for size in (10, 100_000):
        generator = torch.Generator().manual_seed(size)
        rewards, logprobs = torch.rand(size, generator=generator), -100 * torch.rand(size, generator=generator)
        with Operations() as operations:
            increase_variance(rewards, logprobs, size, reward_range=(0.0, 1.0))
        assert operations.largest == size
        counted[size] = operations.names
    assert counted[10] == counted[100_000]
    assert counted[10].count("sort") == 1
    assert not {"mm", "bmm", "matmul", "einsum", "cdist"} & set(counted[10])


@pytest.mark.parametrize(
    ("rewards", "logprobs", "reward_range", "message"),
    [
        ([0.5, 1.5], [0.0, 0.0], (0, 1), r"reward 1.5 is outside the range \[0, 1\]"),
        ([0.5, -0.5], [0.0, 0.0], (0, 1), "reward -0.5 is outside"),
        ([0.5, math.inf], [0.0, 0.0], None, "reward inf is outside"),
        ([0.5, 0.5], [0.0, 0.0], (1, 1), r"the range of rewards is \[1, 1\]"),
        ([0.5, 0.5], [0.0, NAN], (0, 1), "no finite reference log-probability"),
        ([0.5, 0.5], [0.0, -math.inf], (0, 1), "no finite reference log-probability"),
        ([0.5, 0.5], [0.0] * 4, (0, 1), "2 rewards but 4 reference_logprobs"),
        ([0.5, 0.5, 0.5], [0.0, 0.0, 0.0], (0, 1), "not whole groups of 2"),
    ],
)
def test_refuses_what_makes_no_sense(
    rewards: list[float], logprobs: list[float], reward_range: tuple[float, float] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        increase_variance(torch.tensor(rewards), torch.tensor(logprobs), 2, reward_range=reward_range)
