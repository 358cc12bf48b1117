"""Proximal RLOO: PPO's clipped surrogate with a response as one action.

Source: Noukhovitch et al. 2024, Asynchronous RLHF (arXiv 2410.18252), where leave-one-out advantages meet responses of
an older policy. PPO's equation 7 (arXiv 1707.06347), with the ratio of whole responses:

    rho = exp(log pi(y) - log pi_old(y)),  loss = -min(rho A, clip(rho, 1 - cliprange, 1 + cliprange) A)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuse.algorithms.group_batch import GroupTargets
from fuse.algorithms.grpo_loss import ENTROPY, LOSS
from fuse.algorithms.policy_loss import clipped_surrogate, sampler_differences
from fuse.algorithms.sequences import Sequences
from fuse.micro_batch import Metric, Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs


def proximal_rloo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float, weights: Tensor | None = None
) -> tuple[Tensor, dict[Metric, Tensor]]:
    """The mean loss of responses and its metrics; zero for none.

    logprobs, old_logprobs: [rows], of whole responses: sums over tokens. advantages: [rows]; 0 for a response without
    a reward, which counts in the mean. weights: [rows], to be summed with instead.

    Raises: ValueError for shapes that differ, and for a clip range that is not positive.
    """
    if not logprobs.shape == old_logprobs.shape == advantages.shape:
        raise ValueError(
            f"logprobs, old_logprobs and advantages are {list(logprobs.shape)}, {list(old_logprobs.shape)} and "
            f"{list(advantages.shape)}: pass one of each for every response"
        )
    if not cliprange > 0:
        raise ValueError(f"the clip range is {cliprange}: it must be positive")
    counted = torch.ones_like(advantages, dtype=torch.bool)
    return clipped_surrogate(logprobs, old_logprobs, advantages, counted, cliprange, weights)


def proximal_rloo_policy_loss(
    hidden: Tensor,
    head: nn.Module,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    cliprange: float,
    num_tokens: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The weighted loss of a micro-batch, and its metrics. hidden: [positions, hidden].

    num_tokens: as in PPO's loss.
    """
    targets = micro_batch.targets
    assert isinstance(targets, GroupTargets)
    sequences = Sequences.of(micro_batch)
    logprobs, entropy = token_logprobs(hidden, head, targets.token_ids, temperature, num_tokens=num_tokens)
    loss, metrics = proximal_rloo_loss(
        sequences.sum(logprobs),
        sequences.sum(targets.old_logprobs),
        sequences.mean(targets.advantages),
        cliprange=cliprange,
        weights=None if micro_batch.row_weights is None else micro_batch.row_weights.of_samples,
    )
    differences = sampler_differences(logprobs.detach(), targets.sampler_logprobs, targets.mask)
    return loss * micro_batch.weight, {
        LOSS: loss.detach(),
        ENTROPY: entropy.detach().sum() / max(1, len(entropy)),
        **metrics,
        **differences,
    }
