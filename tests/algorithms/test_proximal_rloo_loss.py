"""Proximal RLOO's loss: by hand, and against the peers' formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuse.algorithms.policy_loss import APPROXIMATE_KL, CLIP_FRACTION, RATIO
from fuse.algorithms.proximal_rloo_loss import proximal_rloo_loss


def test_clips_the_ratio_of_whole_responses_in_the_direction_of_the_advantage() -> None:
    # Ratios 2, 2, 1/2, 1/2; advantages 1, -1, 1, -1; clip range 0.2: 1.2, -2, 1/2, -0.8.
    ratios = torch.tensor([2.0, 2.0, 0.5, 0.5])
    loss, metrics = proximal_rloo_loss(ratios.log(), torch.zeros(4), torch.tensor([1.0, -1, 1, -1]), cliprange=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 2 + 0.5 - 0.8) / 4)
    assert metrics[CLIP_FRACTION].item() == 0.5
    assert metrics[RATIO].item() == pytest.approx(1.25)
    assert metrics[APPROXIMATE_KL].item() == pytest.approx(0.5 * math.log(2) ** 2)


def test_gradient_of_unchanged_policies_is_that_of_rloo() -> None:
    logprobs = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    advantages = torch.tensor([1.0, 0.0, -0.5])
    proximal_rloo_loss(logprobs, logprobs.detach(), advantages, cliprange=0.2)[0].backward()
    torch.testing.assert_close(logprobs.grad, -advantages / 3)


def test_no_responses_are_no_loss() -> None:
    none = torch.zeros(0, requires_grad=True)
    loss, metrics = proximal_rloo_loss(none, torch.zeros(0), torch.zeros(0), cliprange=0.2)
    loss.backward()
    assert loss.item() == 0
    assert metrics[RATIO].item() == 1


def peer_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """async_rlhf's and TRL's, token tensors [samples, width] with zeros where there is no token."""
    losses = []
    for row, old_row, advantage in zip(logprobs, old_logprobs, advantages, strict=True):
        ratio = torch.exp(row.sum() - old_row.sum())
        clipped = torch.clamp(ratio, 1.0 - cliprange, 1.0 + cliprange)
        losses.append(torch.max(-advantage * ratio, -advantage * clipped))
    return torch.stack(losses).mean()


def test_equals_the_peers() -> None:
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(16, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.randint(0, 6, (16, 1), generator=generator)
    old = old * mask
    new = ((old + 0.2 * torch.randn(16, 5, generator=generator, dtype=torch.float64)) * mask).requires_grad_()
    advantages = torch.randn(16, generator=generator, dtype=torch.float64)
    expected = peer_loss(new, old, advantages, 0.2)
    loss, metrics = proximal_rloo_loss(new.sum(1), old.sum(1), advantages, cliprange=0.2)
    assert 0 < metrics[CLIP_FRACTION] < 1
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, new)[0])


@pytest.mark.parametrize(
    ("num_advantages", "cliprange", "message"), [(3, 0.2, r"\[2\], \[2\] and \[3\]"), (2, 0.0, "the clip range is 0.0")]
)
def test_refuses_what_makes_no_sense(num_advantages: int, cliprange: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proximal_rloo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(num_advantages), cliprange=cliprange)
