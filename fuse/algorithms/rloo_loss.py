"""RLOO's loss: the clipped ratio of whole responses.

Source: Ahmadian et al. 2024 (arXiv 2402.14740), with PPO's clipping as in TRL's RLOOTrainer (trl 1.12).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fuse.algorithms.group_batch import GroupTargets
from fuse.algorithms.grpo_loss import ENTROPY, LOSS, clip_metrics
from fuse.algorithms.policy_loss import sampler_differences
from fuse.algorithms.sequences import Sequences
from fuse.micro_batch import Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs


def rloo_loss(
    hidden: Tensor,
    head: nn.Module,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    epsilon_low: float,
    epsilon_high: float,
    num_tokens: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The weighted loss of a micro-batch, and its metrics. hidden: [positions, hidden].

    epsilon_low, epsilon_high: how far below and above 1 a response's ratio may move it. num_tokens: as in PPO's loss.
    """
    targets = micro_batch.targets
    assert isinstance(targets, GroupTargets)
    sequences = Sequences.of(micro_batch)
    logprobs, entropy = token_logprobs(hidden, head, targets.token_ids, temperature, num_tokens=num_tokens)
    ratio = sequences.sum(logprobs - targets.old_logprobs).exp()
    advantages = sequences.mean(targets.advantages)
    bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    losses, rows = -torch.min(ratio * advantages, bounded * advantages), micro_batch.row_weights
    loss = losses.mean() if rows is None else (losses * rows.of_samples).sum()
    with torch.no_grad():
        is_low = sequences.expand(((ratio < 1 - epsilon_low) & (advantages < 0)).float())
        is_high = sequences.expand(((ratio > 1 + epsilon_high) & (advantages > 0)).float())
        metrics = {
            LOSS: loss.detach(),
            ENTROPY: entropy.detach().sum() / max(1, len(entropy)),
            **clip_metrics(is_low, is_high, "sequence", sequences),
            **sampler_differences(logprobs.detach(), targets.sampler_logprobs, targets.mask),
        }
    return loss * micro_batch.weight, metrics
