"""PPO's clipped policy loss.

Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7; means as in TRL's PPOTrainer (trl 1.12): over the tokens of
a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fuse.algorithms.batch import Positions
from fuse.algorithms.means import masked_mean, mean
from fuse.micro_batch import Metric, Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs

INVALID_LOGPROB = 1.0
"""The log-probability that padded layouts hold where there is no token, in both policies, so that their ratio is 1."""

APPROXIMATE_KL = Metric("policy/approxkl_avg")
CLIP_FRACTION = Metric("policy/clipfrac_avg")
ENTROPY = Metric("policy/entropy_avg")
POLICY_LOSS = Metric("loss/policy_avg")
RATIO = Metric("val/ratio")
# How far the sampler's log-probabilities are from the trainer's before it steps. In fp32 rounding alone makes a
# difference, about 1e-6: more means that engine and trainer hold other weights, or compute otherwise.
SAMPLER_TOKENS = Metric("val/sampler_tokens", "sum", first_step=True)
SAMPLER_DIFFERENCE = Metric("val/sampler_logprob_diff", "sum", per=SAMPLER_TOKENS.name, first_step=True)
LARGEST_SAMPLER_DIFFERENCE = Metric("val/sampler_logprob_diff_max", "max", first_step=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """What the policy loss compares with, all [positions]: token_ids int64, mask bool, the others fp32."""

    positions: ClassVar[Positions] = "tokens"
    fill: ClassVar[Mapping[str, float]] = {"old_logprobs": INVALID_LOGPROB}

    token_ids: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


def clipped_policy_loss(
    hidden: Tensor,
    head: nn.Module,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    cliprange: float,
    num_tokens: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The weighted loss of a micro-batch, and its metrics. hidden: [positions, hidden].

    num_tokens: that a response may consist of, the first of the vocabulary; None for all.
    """
    targets = micro_batch.targets
    assert isinstance(targets, PolicyTargets)
    logprobs, entropy = token_logprobs(hidden, head, targets.token_ids, temperature, num_tokens=num_tokens)
    logprobs = logprobs.masked_fill(~targets.mask, INVALID_LOGPROB)
    loss, metrics = clipped_surrogate(
        logprobs,
        targets.old_logprobs,
        targets.advantages,
        targets.mask,
        cliprange,
        weights=None if micro_batch.row_weights is None else micro_batch.row_weights.of_positions,
    )
    metrics |= {
        ENTROPY: mean(entropy.detach()),
        **sampler_differences(logprobs.detach(), targets.old_logprobs, targets.mask),
    }
    return loss * micro_batch.weight, metrics


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[Metric, Tensor]]:
    """Clipped surrogate loss, a mean over the positions where `mask` is true, and its metrics.

    All arguments are [positions]. `mask` is all true for ragged layouts; where it is false (padded layouts) both
    log-probabilities must be INVALID_LOGPROB: the reported ratio and KL average over those positions too.
    weights: see `masked_mean`; of the loss alone.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    loss = masked_mean(torch.max(unclipped, clipped), mask, weights)
    with torch.no_grad():
        return loss, {
            APPROXIMATE_KL: 0.5 * mean(log_ratio.square()),
            CLIP_FRACTION: masked_mean((clipped > unclipped).float(), mask),
            POLICY_LOSS: loss.detach(),
            RATIO: mean(ratio, of_none=1.0),
        }


def sampler_differences(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> dict[Metric, Tensor]:
    """How far the trainer's log-probabilities are from the sampler's where `mask` is true, [positions] each."""
    differences = (logprobs - sampler_logprobs).abs().masked_fill(~mask, 0.0)
    return {
        SAMPLER_DIFFERENCE: differences.sum(),
        LARGEST_SAMPLER_DIFFERENCE: differences.amax() if differences.numel() else differences.sum(),
        SAMPLER_TOKENS: mask.sum(),
    }
