"""GRPOVI: rewards of a group moved as far apart as their range, their order and their expectation allow.

Source: Yang et al. 2025, Accelerating RLHF Training with Reward Variance Increase (arXiv 2505.23247). With the rewards
r_1 >= ... >= r_n of a group, their range [m, M] and the reference model's probabilities p_1, ..., p_n, normalised,

    maximise    sum_i p_i z_i^2
    subject to  m <= z_i <= M,  z_i >= z_{i+1},  sum_i p_i z_i = sum_i p_i r_i

whose solution takes the place of r wherever GRPO computes advantages from rewards.

Closed form, in place of the paper's search over the extreme points: the first K rewards become M, those after K + 1
become m, and z_{K+1} in between keeps the expectation, K being the largest k for which raising the first k to M costs
no more than lowering the others to m gives,

    D_k = sum_{i<=k} p_i (M - r_i)  <=  S_k = sum_{i>k} p_i (r_i - m)
    z_{K+1} = m + (S_K - D_K) / p_{K+1}

Proof. Write W_k(z) = sum_{i<=k} p_i z_i and c for the expectation. For every feasible z, W_k(z) <= M (p_1 + ... + p_k),
and W_k(z) <= c - m (p_{k+1} + ... + p_n); the z above reaches the first bound for k <= K and the second for k > K. So
it majorises every feasible z, with weights p, and no convex function has a larger expectation (Fuchs 1947).

Deviations: equal rewards stay equal (the paper orders them in some way), so that the order of samples is of no
consequence. Without a range of rewards, every group has its own. The paper leaves open whether probabilities are
normalised by length; here they are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.algorithms.groups import by_group

# Of probabilities, relative to the largest of the group: float64 has hardly smaller ones, and none may become zero.
_SMALLEST_LOG_PROBABILITY = -700.0


def increase_variance(
    rewards: Tensor,
    reference_logprobs: Tensor,
    num_generations: int,
    *,
    reward_range: tuple[float, float] | None = None,
) -> Tensor:
    """Adjusted rewards [samples], in the dtype of `rewards`: of every group, the upper end, the lower end of the range,
    and at most one value between them.

    rewards: [samples], the samples of a prompt consecutive. One that is NaN stays NaN and counts for nothing.
    reference_logprobs: [samples], of whole responses under the reference model: sums over tokens, in nats.
    reward_range: that the reward model's rewards lie in; None for the smallest and largest reward of each group.

    Takes O(n log n) for groups of n: one sort, the rest are scans.

    Raises: ValueError on shapes that do not fit, on rewards outside the range, and on log-probabilities that are not
        finite where there is a reward.
    """
    grouped, logprobs = (by_group(one, num_generations).double() for one in (rewards, reference_logprobs))
    missing = grouped.isnan()
    _check(grouped, logprobs, missing, reward_range)
    if reward_range is None:
        low = grouped.masked_fill(missing, torch.inf).amin(dim=1, keepdim=True)
        high = grouped.masked_fill(missing, -torch.inf).amax(dim=1, keepdim=True)
    else:
        low, high = (torch.full_like(grouped[:, :1], end) for end in reward_range)
    spread = high > low  # false for equal rewards, and where there is none
    level = torch.where(missing | ~spread, 0.0, (grouped - low) / (high - low))
    adjusted = torch.lerp(low, high, _extreme_levels(level, _probabilities(logprobs, missing)))
    return torch.where(missing | ~spread, grouped, adjusted).to(rewards.dtype).view(-1)


def _probabilities(logprobs: Tensor, missing: Tensor) -> Tensor:
    """[groups, n], in proportion: of a group's samples that have a reward the largest is 1, the others are positive."""
    logprobs = logprobs.masked_fill(missing, -torch.inf)
    relative = logprobs - logprobs.amax(dim=1, keepdim=True)
    return relative.clamp(min=_SMALLEST_LOG_PROBABILITY).exp().masked_fill(missing, 0.0)


def _extreme_levels(levels: Tensor, probabilities: Tensor) -> Tensor:
    """The solution for the range [0, 1], [groups, n] like its arguments; equal levels make one block.

    All sums are of terms that are not negative, so none loses digits, however unlike the probabilities are.
    """
    descending, order = levels.sort(dim=1, descending=True)
    block = torch.zeros_like(order)
    block[:, 1:] = (descending.diff(dim=1) != 0).cumsum(dim=1)
    mass = torch.zeros_like(levels).scatter_add(1, block, probabilities.gather(1, order))
    level = torch.zeros_like(levels).scatter(1, block, descending)

    cost = (mass * (1 - level)).cumsum(dim=1)  # D_k, of the blocks up to the k-th
    gain = (mass * level).flip(1).cumsum(dim=1).flip(1)  # S_{k-1}, of the blocks from the k-th on
    zero = torch.zeros_like(cost[:, :1])
    cost_before, gain_after = torch.cat([zero, cost[:, :-1]], dim=1), torch.cat([gain[:, 1:], zero], dim=1)

    num_raised = (cost <= gain_after).long().cumprod(dim=1).sum(dim=1, keepdim=True)  # K
    index = torch.arange(levels.shape[1], device=levels.device)
    between = torch.where(index == num_raised, ((gain - cost_before) / mass).clamp(0.0, 1.0), 0.0)
    solution = torch.where(index < num_raised, 1.0, between)
    return torch.empty_like(levels).scatter(1, order, solution.gather(1, block))


def _check(rewards: Tensor, logprobs: Tensor, missing: Tensor, reward_range: tuple[float, float] | None) -> None:
    if rewards.shape != logprobs.shape:
        raise ValueError(
            f"{rewards.numel()} rewards but {logprobs.numel()} reference_logprobs: pass one of each for every sample"
        )
    if not bool((missing | logprobs.isfinite()).all()):
        raise ValueError(
            "a sample has a reward but no finite reference log-probability: score it, or set its reward to NaN"
        )
    low, high = reward_range or (-torch.inf, torch.inf)
    if not low < high:
        raise ValueError(f"the range of rewards is [{low}, {high}]: its lower end must be below its upper end")
    outside = ~missing & ((rewards < low) | (rewards > high) | rewards.isinf())
    if bool(outside.any()):
        raise ValueError(
            f"reward {float(rewards[outside][0])} is outside the range [{low}, {high}]: "
            "give the range of the reward model, or None for that of each group"
        )
