"""Rewards and advantages in one pass: by hand, step by step, padded, and on input that breaks its rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuse.algorithms.batch import Segments
from fuse.ops import describe
from fuse.ops.gae import gae, gae_reference
from fuse.ops.shaped_gae import kl_penalty, shape_rewards, shaped_gae, shaped_gae_reference

SETTINGS = {"kl_coef": 0.05, "estimator": "k1", "whiten_rewards": False, "gamma": 0.97, "lam": 0.9}


def batch(lengths: list[int], width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    segments = Segments.from_lengths(lengths, width)
    generator = torch.Generator().manual_seed(seed)
    sizes = (sum(lengths), sum(lengths), len(lengths), int(segments.value_offsets[-1]))
    rows = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return *rows, segments.token_offsets, segments.value_offsets


def test_rewards_by_hand() -> None:
    # Sample 0 has a value after its two tokens, sample 1 fills the batch's width.
    kl, token_rows, value_offsets = (
        torch.tensor([1.0, 2, 3, 4, 5]),
        torch.tensor([0, 1, 3, 4, 5]),
        torch.tensor([0, 3, 6]),
    )
    rewards = shape_rewards(kl, torch.tensor([10.0, 20.0]), token_rows, value_offsets, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.1, -0.2, 10.0, -0.3, -0.4, 19.5]))


def test_k3_is_positive_and_both_estimators_vanish_for_equal_policies() -> None:
    logprobs, reference = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert bool((kl_penalty(logprobs, reference, "k3") > 0).all())
    for estimator in ("k1", "k3"):
        assert kl_penalty(logprobs, logprobs, estimator).abs().max() == 0


def _padded_advantages(
    logprobs: Tensor,
    reference: Tensor,
    values: Tensor,
    scores: Tensor,
    lengths: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
    whiten_rewards: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


@given(
    lengths=st.lists(st.integers(0, 6), min_size=2, max_size=5).filter(lambda lengths: sum(lengths) > 2),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**31),
    gamma=st.sampled_from([1.0, 0.9]),
    whiten_rewards=st.booleans(),
)
def test_equals_the_padded_formulation(
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

    segments = Segments.from_lengths(lengths, width)
    for implementation in (shaped_gae, shaped_gae_reference):
        _, advantages, returns = implementation(
            logprobs[is_token], reference[is_token], scores, values[has_value],
            segments.token_offsets, segments.value_offsets,
            kl_coef=0.1, estimator="k1", whiten_rewards=whiten_rewards, gamma=gamma, lam=0.95,
        )  # fmt: skip
        torch.testing.assert_close(advantages, expected_advantages[is_token], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(returns, expected_returns[has_value], rtol=1e-4, atol=1e-4)


def test_two_samples_by_hand() -> None:
    # Coefficient 1, no discounts; values 0, so that advantages are sums of rewards to come. Sample 0 has a value after
    # its two tokens, which takes the score; sample 1 fills the batch's width, so its last token does.
    inputs = (
        torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        torch.zeros(5),
        torch.tensor([10.0, 20.0]),
        torch.zeros(6),
        torch.tensor([0, 2, 5]),
        torch.tensor([0, 3, 6]),
    )
    kl, advantages, returns = shaped_gae(*inputs, kl_coef=1.0, estimator="k1", whiten_rewards=False, gamma=1.0, lam=1.0)
    assert kl.tolist() == [1, 2, 3, 4, 5]
    assert returns.tolist() == [7, 8, 10, 8, 11, 15]
    expected = torch.tensor([7.0, 8, 8, 11, 15])
    torch.testing.assert_close(advantages, (expected - 9.8) / (expected.var() + 1e-8).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [True, False])
@pytest.mark.parametrize(("lengths", "width"), [([5], 5), ([1, 7, 3], 9), ([0, 4, 0, 2], 4), ([0, 129, 64, 1], 129)])
def test_equals_its_steps(
    dtype: torch.dtype, estimator: str, whiten_rewards: bool, lengths: list[int], width: int
) -> None:
    options = SETTINGS | {"estimator": estimator, "whiten_rewards": whiten_rewards}
    inputs = batch(lengths, width, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    results = shaped_gae(*inputs, **options), shaped_gae_reference(*inputs, **options)
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) >= 2),
    extra=st.integers(0, 3),
    estimator=st.sampled_from(["k1", "k3"]),
    whiten_rewards=st.booleans(),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_equals_its_steps_on_any_batch(
    lengths: list[int], extra: int, estimator: str, whiten_rewards: bool, gamma: float, lam: float, seed: int
) -> None:
    inputs = batch(lengths, max(lengths) + extra, torch.float64, seed)
    options = {"kl_coef": 0.3, "estimator": estimator, "whiten_rewards": whiten_rewards, "gamma": gamma, "lam": lam}
    for ours, expected in zip(shaped_gae(*inputs, **options), shaped_gae_reference(*inputs, **options), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_bfloat16_is_served_by_torch() -> None:
    inputs = batch([5, 3], 6, torch.bfloat16)
    assert all(one.dtype == torch.bfloat16 for one in shaped_gae(*inputs, **SETTINGS))


def test_native_code_serves() -> None:
    assert describe()["shaped_gae"].startswith("native C++")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [[5], [0, 4, 0, 2], [0, 129, 64, 1, 32, 33]])
def test_gpus_compute_what_cpus_do(dtype: torch.dtype, lengths: list[int]) -> None:
    inputs = batch(lengths, max(lengths), dtype)
    device_inputs = [one.cuda() for one in inputs]
    for options in (SETTINGS, SETTINGS | {"estimator": "k3", "whiten_rewards": True}):
        ours = shaped_gae(*device_inputs, **options)
        for one, expected in zip(ours, shaped_gae(*inputs, **options), strict=True):
            torch.testing.assert_close(one.cpu(), expected, rtol=1e-5, atol=1e-5)
    rewards, offsets = device_inputs[3].flip(0), device_inputs[5]
    for one, expected in zip(
        gae(rewards, device_inputs[3], offsets, 0.97, 0.9),
        gae_reference(rewards.cpu(), inputs[3], inputs[5], 0.97, 0.9),
        strict=True,
    ):
        assert torch.equal(one.cpu(), expected)


INPUTS = batch([2, 3], 3)


@pytest.mark.parametrize(
    ("index", "tensor", "message"),
    [
        (1, INPUTS[1][:4], r"reference_logprobs is \[4\]"),
        (2, INPUTS[2].double(), "scores is .*float64"),
        (4, INPUTS[4].int(), "token_offsets is .*int32"),
        (4, torch.tensor([0, 6, 5]), "token_offsets is .*: it must rise from 0 to the 5"),
        (5, torch.tensor([0, 3, 5]), "value_offsets is .*: it must rise from 0 to the 6"),
        (5, torch.tensor([0, 1, 6]), r"\[1, 5\] values for \[2, 3\] tokens"),
    ],
)
def test_says_which_rule_the_input_breaks(index: int, tensor: Tensor, message: str) -> None:
    inputs = [*INPUTS[:index], tensor, *INPUTS[index + 1 :]]
    with pytest.raises(ValueError, match=message):
        shaped_gae(*inputs, **SETTINGS)


def test_one_token_cannot_be_whitened() -> None:
    with pytest.raises(ValueError, match="cannot whiten 1"):
        shaped_gae(*batch([1], 3), **SETTINGS)
