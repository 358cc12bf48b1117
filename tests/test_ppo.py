"""PPO's ragged functions against the padded formulation they replace, and against hand-derived values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse import ppo

PAD, STOP = 0, 1


@pytest.mark.parametrize(
    ("response", "stop", "length"),
    [
        ([5, 6, STOP], STOP, 3),  # the stop token counts
        ([5, STOP, 7, STOP], STOP, 2),  # nothing after the first one does
        ([5, 6, 7], STOP, 3),
        ([5, PAD, 6, STOP], STOP, 1),  # a generated padding token ends what counts
        ([PAD, 5], STOP, 0),
        ([5, STOP, 6], None, 3),
        ([5, 6, PAD], PAD, 2),  # stop and padding are one token: it does not count
    ],
)
def test_response_length(response: list[int], stop: int | None, length: int) -> None:
    assert ppo.response_length(response, stop, PAD) == length


def test_segments_give_one_value_more_than_tokens_unless_the_response_is_as_wide_as_the_batch() -> None:
    segments = ppo.Segments.from_lengths([2, 0, 3], width=3)
    assert segments.token_offsets.tolist() == [0, 2, 2, 5]
    assert segments.value_offsets.tolist() == [0, 3, 4, 7]
    assert segments.token_rows.tolist() == [0, 1, 4, 5, 6]
    assert [segments.num_values(sample) for sample in range(3)] == [3, 1, 3]


def test_rewards_by_hand() -> None:
    segments = ppo.Segments.from_lengths([2, 3], width=3)
    kl = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    rewards = ppo.shape_rewards(kl, torch.tensor([10.0, 20.0]), segments, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.1, -0.2, 10.0, -0.3, -0.4, 19.5]))


def test_k3_is_positive_and_both_estimators_vanish_for_equal_policies() -> None:
    logprobs, reference = torch.randn(100), torch.randn(100)
    assert bool((ppo.kl_penalty(logprobs, reference, "k3") > 0).all())
    for estimator in ("k1", "k3"):
        assert ppo.kl_penalty(logprobs, logprobs, estimator).abs().max() == 0  # type: ignore[arg-type]


def _padded_advantages(
    logprobs: torch.Tensor,
    reference: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    lengths: torch.Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same quantities with masks over [samples, width], written as the loop that defines them."""
    num_samples, width = logprobs.shape
    position = torch.arange(width).expand(num_samples, width)
    is_token, has_value = position < lengths[:, None], position <= lengths[:, None]
    values = values * has_value
    rewards = -kl_coef * (logprobs - reference) * is_token
    rewards[torch.arange(num_samples), lengths.clamp(max=width - 1)] += scores
    if whiten_rewards:
        rewards = (rewards - rewards[has_value].mean()) / (rewards[has_value].var() + 1e-8).sqrt() + rewards[
            has_value
        ].mean()
        rewards = rewards * has_value
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros(num_samples)
    for t in reversed(range(width)):
        following = values[:, t + 1] if t + 1 < width else 0.0
        carry = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * carry
        advantages[:, t] = carry
    whitened = (advantages - advantages[is_token].mean()) / (advantages[is_token].var() + 1e-8).sqrt()
    return whitened, advantages + values, is_token, has_value


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=5).filter(lambda lengths: sum(lengths) > 2),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([1.0, 0.9]),
    whiten_rewards=st.booleans(),
)
def test_ragged_advantages_equal_the_padded_ones(
    lengths: list[int], extra: int, seed: int, gamma: float, whiten_rewards: bool
) -> None:
    width = max(lengths) + extra
    torch.manual_seed(seed)
    logprobs, reference, values = torch.randn(3, len(lengths), width)
    scores = torch.randn(len(lengths))
    counts = torch.tensor(lengths)
    expected_advantages, expected_returns, is_token, has_value = _padded_advantages(
        logprobs, reference, values, scores, counts, kl_coef=0.1, gamma=gamma, lam=0.95, whiten_rewards=whiten_rewards
    )

    segments = ppo.Segments.from_lengths(lengths, width)
    kl = ppo.kl_penalty(logprobs[is_token], reference[is_token], "k1")
    rewards = ppo.shape_rewards(kl, scores, segments, 0.1)
    if whiten_rewards:
        rewards = ppo.whiten(rewards, shift_mean=False)
    advantages, returns = ppo.advantages_and_returns(rewards, values[has_value], segments, gamma=gamma, lam=0.95)

    torch.testing.assert_close(advantages, expected_advantages[is_token], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(returns, expected_returns[has_value], rtol=1e-4, atol=1e-4)


def test_whitening_needs_two_values() -> None:
    with pytest.raises(ValueError, match="too few response tokens"):
        ppo.whiten(torch.ones(1))


def test_policy_loss_clips_in_the_direction_of_the_advantage() -> None:
    advantages = torch.tensor([1.0, -1.0])
    mask = torch.ones(2, dtype=torch.bool)
    far = torch.tensor([2.0, 2.0]).log()  # ratio 2, clip range 0.2
    result = ppo.policy_loss(far, torch.zeros(2), advantages, mask, 0.2)
    assert result.loss.item() == pytest.approx((-1.2 + 2.0) / 2)
    assert result.clip_fraction.item() == 0.5
    assert result.ratio.item() == pytest.approx(2.0)


def test_value_loss_takes_the_larger_of_clipped_and_unclipped() -> None:
    values, old_values, returns = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([2.0])
    loss, clip_fraction = ppo.value_loss(values, old_values, returns, torch.ones(1, dtype=torch.bool), 0.2)
    assert loss.item() == pytest.approx(0.5 * 0.8**2)
    assert clip_fraction.item() == 1.0


def test_a_micro_batch_of_empty_responses_has_no_loss() -> None:
    empty, mask = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    assert ppo.policy_loss(empty, empty, empty, mask, 0.2).loss.item() == 0.0
