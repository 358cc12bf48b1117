"""REINFORCE++ and its baseline variant: by hand, and against OpenRLHF's padded formulation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuse.algorithms.reinforce_plus_plus import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    token_rewards,
    whiten_over,
)

NAN = math.nan
OFFSETS = torch.tensor([0, 2, 2, 5])


def test_token_rewards_by_hand() -> None:
    shaped = token_rewards(torch.tensor([10.0, 30.0, 20.0]), torch.tensor([1.0, 2, 3, 4, 5]), OFFSETS, 0.1)
    torch.testing.assert_close(shaped, torch.tensor([-0.1, 9.8, -0.3, -0.4, 19.5]))


def test_advantages_by_hand() -> None:
    # Token rewards 0 1 | 0 0 2; returns with gamma 1/2: 1/2 1 | 1/2 1 2, of mean 1 and variance (1/4 + 1/4 + 1) / 5.
    rewards = torch.tensor([1.0, 5.0, 2.0])
    advantages = reinforce_plus_plus_advantages(rewards, torch.zeros(5), OFFSETS, kl_coef=0.1, gamma=0.5)
    torch.testing.assert_close(advantages, torch.tensor([-0.5, 0, -0.5, 0, 1]) / math.sqrt(0.3))


def test_baseline_advantages_by_hand() -> None:
    # One token each: rewards less the mean of their group -1 1 | -2 2, of mean 0 and variance 5/2.
    rewards, offsets = torch.tensor([1.0, 3.0, 10.0, 14.0]), torch.arange(5)
    advantages = reinforce_plus_plus_baseline_advantages(rewards, torch.zeros(4), offsets, 2, kl_coef=0.0)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1, -2, 2]) / math.sqrt(2.5))


def test_clipping_is_of_rewards_and_in_the_baseline_variant_of_what_the_mean_leaves() -> None:
    rewards, offsets, kl = torch.tensor([0.0, 30.0]), torch.arange(3), torch.zeros(2)
    clipped = reinforce_plus_plus_advantages(torch.tensor([0.0, 10.0]), kl, offsets, kl_coef=0.0)
    torch.testing.assert_close(
        reinforce_plus_plus_advantages(rewards, kl, offsets, kl_coef=0.0, clip_range=(-10, 10)), clipped
    )
    # -15 and 15 become -10 and 10; the KL penalty, of the last token, is not clipped.
    kl = torch.tensor([4.0, 0.0])
    both = reinforce_plus_plus_baseline_advantages(rewards, kl, offsets, 2, kl_coef=1.0, clip_range=(-10, 10))
    torch.testing.assert_close(both, whiten_over(torch.tensor([-14.0, 10.0]), torch.ones(2, dtype=torch.bool)))


def test_samples_without_reward_have_advantage_zero_and_change_nothing() -> None:
    kl = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    rewards, offsets = torch.tensor([1.0, NAN, 2.0]), torch.tensor([0, 2, 3, 6])
    others = torch.tensor([0, 1, 3, 4, 5])
    advantages = reinforce_plus_plus_advantages(rewards, kl, offsets, kl_coef=0.1)
    assert advantages[2] == 0
    expected = reinforce_plus_plus_advantages(rewards[[0, 2]], kl[others], torch.tensor([0, 2, 5]), kl_coef=0.1)
    torch.testing.assert_close(advantages[others], expected)
    # The baseline of a group is the mean of those that have a reward: 1.5.
    baseline = reinforce_plus_plus_baseline_advantages(rewards, kl, offsets, 3, kl_coef=0.1)
    expected = reinforce_plus_plus_advantages(rewards - 1.5, kl, offsets, kl_coef=0.1)
    torch.testing.assert_close(baseline, expected)


def test_nothing_to_learn_is_zero() -> None:
    no_rewards = torch.full((3,), NAN)
    assert not reinforce_plus_plus_advantages(no_rewards, torch.ones(5), OFFSETS, kl_coef=0.1).any()
    no_tokens = torch.zeros(4, dtype=torch.int64)
    assert reinforce_plus_plus_advantages(torch.ones(3), torch.zeros(0), no_tokens, kl_coef=0.1).shape == (0,)
    equal = torch.tensor([2.0, 2.0])
    assert not reinforce_plus_plus_advantages(equal, torch.zeros(2), torch.arange(3), kl_coef=0.1).any()


def padded_advantages(
    rewards: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    clip_range: tuple[float, float],
    num_generations: int | None,
) -> Tensor:
    """OpenRLHF 0.11's steps, one loop each: [samples, width], `mask` true where there is a token."""
    num_samples, width = mask.shape
    shaped = rewards.clone()
    if num_generations is not None:
        for first in range(0, num_samples, num_generations):
            group = rewards[first : first + num_generations]
            for sample in range(first, first + num_generations):
                shaped[sample] = rewards[sample] - group.sum() / num_generations
    shaped = shaped.clamp(*clip_range)
    returns = torch.zeros(num_samples, width)
    for sample in range(num_samples):
        tokens = [t for t in range(width) if mask[sample, t]]
        to_come = 0.0
        for t in reversed(tokens):
            reward = -kl_coef * kl[sample, t] + (shaped[sample] if t == tokens[-1] else 0.0)
            to_come = reward + gamma * to_come
            returns[sample, t] = to_come
    mean = (returns * mask).sum() / mask.sum()
    variance = ((returns - mean) ** 2 * mask).sum() / mask.sum()
    return (returns - mean) * variance.clamp(min=1e-8).rsqrt()


@given(
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=8).filter(lambda lengths: len(lengths) % 2 == 0),
    extra=st.integers(0, 2),
    gamma=st.sampled_from([1.0, 0.9, 0.0]),
    baseline=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_padded_formulation(lengths: list[int], extra: int, gamma: float, baseline: bool, seed: int) -> None:
    width = max(lengths) + extra
    generator = torch.Generator().manual_seed(seed)
    rewards, kl = torch.randn(len(lengths), generator=generator), torch.randn(len(lengths), width, generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    options = {"kl_coef": 0.1, "clip_range": (-0.5, 0.5)}
    if baseline:
        ours = reinforce_plus_plus_baseline_advantages(rewards, kl[mask], offsets, 2, **options)
        expected = padded_advantages(rewards, kl, mask, **options, gamma=1.0, num_generations=2)
    else:
        ours = reinforce_plus_plus_advantages(rewards, kl[mask], offsets, **options, gamma=gamma)
        expected = padded_advantages(rewards, kl, mask, **options, gamma=gamma, num_generations=None)
    torch.testing.assert_close(ours, expected[mask], rtol=1e-4, atol=1e-4)


def test_no_gradient_flows() -> None:
    kl = torch.ones(5, requires_grad=True)
    assert not reinforce_plus_plus_advantages(torch.ones(3), kl, OFFSETS, kl_coef=0.1).requires_grad


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(2), torch.ones(5), OFFSETS), {}, r"rewards is \[2\] but token_offsets is \[4\]"),
        ((torch.ones(3), torch.ones(4), OFFSETS), {}, "must rise from 0 to the 4 tokens"),
        ((torch.ones(3), torch.ones(5), torch.tensor([0, 6, 5, 5])), {}, "must rise from 0 to the 5 tokens"),
        ((torch.ones(3), torch.ones(5), OFFSETS), {"kl_coef": -0.1}, "kl_coef is -0.1"),
        ((torch.ones(3), torch.ones(5), OFFSETS), {"gamma": 1.5}, "gamma is 1.5"),
        ((torch.ones(3), torch.ones(5), OFFSETS), {"clip_range": (1, -1)}, r"clip_range is \(1, -1\)"),
    ],
)
def test_refuses_what_makes_no_sense(
    arguments: tuple[Tensor, Tensor, Tensor], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        reinforce_plus_plus_advantages(*arguments, **{"kl_coef": 0.1, **options})  # type: ignore[arg-type]


def test_refuses_groups_that_are_not_whole() -> None:
    with pytest.raises(ValueError, match="not whole groups of 2"):
        reinforce_plus_plus_baseline_advantages(torch.ones(3), torch.ones(5), OFFSETS, 2, kl_coef=0.1)
