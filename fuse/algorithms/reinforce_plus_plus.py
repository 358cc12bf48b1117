"""REINFORCE++: rewards to come, whitened over all tokens of the batch, without a critic.

Source: Hu et al. 2025 (arXiv 2501.03262), as OpenRLHF 0.11 computes it. The reward of a token is

    r_t = [t is last] r - kl_coef kl_t

its return is R_t = r_t + gamma R_{t+1}, and its advantage the return less the mean, divided by the standard deviation,
of the returns of all tokens of all samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.algorithms.groups import by_group
from fuse.ops.gae import gae

_SMALLEST_VARIANCE = 1e-8


def reinforce_plus_plus_advantages(
    rewards: Tensor,
    kl: Tensor,
    token_offsets: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """Advantages [tokens], of zero mean and unit variance; no gradient flows.

    rewards: fp32 [samples]. A sample whose reward is NaN counts for nothing; its tokens have advantage 0.
    kl: fp32 [tokens], estimates of KL(policy || reference), see `fuse.ops.shaped_gae.kl_penalty`.
    token_offsets: int64 [samples + 1]; sample i has tokens token_offsets[i]:token_offsets[i + 1].
    clip_range: that rewards are clipped to; None for no clipping.

    Raises: ValueError on shapes that do not fit, a negative kl_coef, an empty clip_range, and a gamma outside [0, 1].
    """
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef is {kl_coef}: it must not be negative")
    if clip_range is not None and not clip_range[0] < clip_range[1]:
        raise ValueError(f"clip_range is {clip_range}: its lower end must be below its upper end")
    has_reward = ~rewards.isnan()
    if clip_range is not None:
        rewards = rewards.clamp(*clip_range)
    shaped = token_rewards(rewards.masked_fill(~has_reward, 0.0), kl, token_offsets, kl_coef)
    # Without values and with lam = 1, GAE's advantages are the returns.
    returns, _ = gae(shaped, torch.zeros_like(shaped), token_offsets, gamma, 1.0)
    return whiten_over(returns, torch.repeat_interleave(has_reward, token_offsets.diff()))


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor,
    kl: Tensor,
    token_offsets: Tensor,
    num_generations: int,
    *,
    kl_coef: float,
    clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """REINFORCE++-baseline: the same of rewards less the mean of their group, without a discount.

    The samples of a prompt are consecutive, `num_generations` of them; `clip_range` is of rewards less the mean.

    Raises: ValueError as `reinforce_plus_plus_advantages`, and if the samples are not a number of whole groups.
    """
    grouped = by_group(rewards, num_generations)
    centred = (grouped - grouped.nanmean(dim=1, keepdim=True)).view(-1)
    return reinforce_plus_plus_advantages(centred, kl, token_offsets, kl_coef=kl_coef, clip_range=clip_range)


def token_rewards(rewards: Tensor, kl: Tensor, token_offsets: Tensor, kl_coef: float) -> Tensor:
    """The reward of every token, [tokens]: the KL penalty, and on the last token of a sample its reward [samples].

    The reward of a sample without tokens is on none.
    """
    if rewards.shape != (len(token_offsets) - 1,):
        raise ValueError(
            f"rewards is {list(rewards.shape)} but token_offsets is {list(token_offsets.shape)}: "
            "pass [samples] and [samples + 1]"
        )
    if (
        kl.ndim != 1
        or [int(token_offsets[0]), int(token_offsets[-1])] != [0, len(kl)]
        or (token_offsets.diff() < 0).any()
    ):
        raise ValueError(
            f"token_offsets is {token_offsets.tolist()}: it must rise from 0 to the {kl.numel()} tokens of kl"
        )
    shaped = -kl_coef * kl
    has_tokens = token_offsets.diff() > 0
    shaped[token_offsets[1:][has_tokens] - 1] += rewards[has_tokens]
    return shaped


def whiten_over(values: Tensor, mask: Tensor) -> Tensor:
    """Values [tokens] less the mean, divided by the (population) standard deviation, of those where `mask` is true;
    zero where it is false."""
    counted = values[mask]
    if not len(counted):
        return torch.zeros_like(values)
    variance, mean = torch.var_mean(counted, correction=0)
    return torch.where(mask, (values - mean) * variance.clamp(min=_SMALLEST_VARIANCE).rsqrt(), 0.0)
