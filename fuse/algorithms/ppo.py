"""PPO as pure tensor functions over ragged responses.

Nothing here is padded. A response of n tokens owns n *token positions* (log-probabilities, advantages) and
min(n + 1, width) *value positions*, `width` being the longest response of the batch: the state after the last
token has a value too, unless the response is as wide as the batch. Segments of one batch lie end to end in flat
tensors; `Segments` says where. All masks of the padded formulation become plain segment boundaries.

Rewards and advantages come from `fuse.ops.shaped_gae`.

Source: Schulman et al. 2017 (arXiv 1707.06347); details as in TRL's PPOTrainer (trl 1.12): losses are token means per
micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The log-probability that padded layouts hold where there is no token, in both policies, so that their ratio is one.
INVALID_LOGPROB = 1.0


def length_to_stop(response_ids: Sequence[int], stop_token_id: int | None) -> int:
    """Number of tokens up to and including the first stop token, all of them without one."""
    if stop_token_id is None or stop_token_id not in response_ids:
        return len(response_ids)
    return response_ids.index(stop_token_id) + 1


def response_length(response_ids: Sequence[int], stop_token_id: int | None, pad_token_id: int) -> int:
    """Number of tokens that count: up to and including the first stop token, and before the first padding token."""
    end = length_to_stop(response_ids, stop_token_id)
    return next((index for index in range(end) if response_ids[index] == pad_token_id), end)


@dataclass(frozen=True, slots=True)
class Segments:
    """Where each response's positions lie in the flat tensors of a batch.

    token_offsets, value_offsets: int64 [num_samples + 1]; sample i owns rows offsets[i]:offsets[i + 1].
    token_rows: int64 [tokens], the value position at which each token was chosen.
    """

    token_offsets: Tensor
    value_offsets: Tensor
    token_rows: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], width: int) -> Segments:
        """Lay out responses of `lengths` tokens in a batch whose longest generated response has `width` tokens."""
        tokens = torch.tensor(lengths, dtype=torch.int64)
        assert int(tokens.max()) <= width
        token_offsets = _offsets(tokens)
        value_offsets = _offsets((tokens + 1).clamp(max=width))
        shift = torch.repeat_interleave(value_offsets[:-1] - token_offsets[:-1], tokens)
        return cls(token_offsets, value_offsets, torch.arange(int(token_offsets[-1])) + shift)

    def num_values(self, sample: int) -> int:
        return int(self.value_offsets[sample + 1] - self.value_offsets[sample])


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """A micro-batch's policy loss and what is reported of it; scalars, means over the positions given."""

    loss: Tensor
    approximate_kl: Tensor
    clip_fraction: Tensor
    ratio: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> PolicyLoss:
    """Clipped surrogate loss, a mean over the positions where `mask` is true.

    All arguments are [positions]. `mask` is all true for ragged layouts; where it is false (padded layouts) both
    log-probabilities must be INVALID_LOGPROB: the reported ratio and KL average over those positions too.
    Source: PPO, equation 7.
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    with torch.no_grad():
        approximate_kl = 0.5 * log_ratio.square().mean()
        clip_fraction = masked_mean((clipped > unclipped).float(), mask)
    loss = masked_mean(torch.max(unclipped, clipped), mask)
    return PolicyLoss(
        loss=loss, approximate_kl=approximate_kl, clip_fraction=clip_fraction, ratio=ratio.detach().mean()
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss and clip fraction, means over the positions where `mask` is true; arguments [positions]."""
    clipped_values = values.clamp(old_values - cliprange, old_values + cliprange)
    unclipped, clipped = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask)
    return loss, masked_mean((clipped > unclipped).float(), mask).detach()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; zero where it is nowhere true, as for a micro-batch of empty responses."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
