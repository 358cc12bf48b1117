"""The loss of a policy without a critic: a surrogate of every token, a KL penalty, and a mean of some kind over both.

Orders of operations, defaults and metrics are those of TRL's GRPOTrainer (trl 1.12); tokens lie end to end here, where
TRL pads. Sources: Shao et al. 2024 (arXiv 2402.03300), equation 3, and those that `surrogates` names; one ratio for a
sequence: GSPO (arXiv 2507.18071); tokens of high entropy alone: arXiv 2506.01939; sequences far off the policy left
out: DeepSeek-V3.2 (arXiv 2512.02556).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from fuse.algorithms.group_batch import GroupTargets
from fuse.algorithms.policy_loss import sampler_differences
from fuse.algorithms.sampler_correction import CorrectionSettings, correction_metrics, correction_ratios
from fuse.algorithms.sequences import Sequences
from fuse.algorithms.surrogates import SURROGATES, SurrogateSettings, Terms, clipped, vespo_weights
from fuse.micro_batch import Metric, Metrics, MicroBatch, RowWeights
from fuse.ops.logprob import token_logprobs

LOSS, KL, ENTROPY = Metric("loss"), Metric("kl"), Metric("entropy")
POLICY_LOSS, ENTROPY_COEF = Metric("policy_loss"), Metric("entropy_coef")
CISPO_CLIPPED = Metric("cispo_clip_ratio")
VESPO_WEIGHT = Metric("vespo/phi_seq_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOLossSettings:
    """temperature, num_tokens: of sampling. loss_type: of `surrogates`, which also chooses the mean.

    level: whether a ratio is a token's, or the geometric mean of its sequence's.
    beta: weight of the KL penalty. weighs_kl: whether that is multiplied by the ratio.
    is_on_policy: whether samples are of the weights that are trained: ratios are then 1, whatever the engine rounds.
    top_entropy_quantile: the share of tokens, by entropy, that are trained on.
    entropy_coef: weight of the entropy, in the mean over the tokens that are trained on, which is to be large.
    off_policy_threshold: largest mean log-ratio of a sequence with a negative advantage; None for any.
    correction: of the sampler's distribution; None for none. max_tokens: of a response.
    micro_batches_per_rollout: that its samples are cut into.
    """

    temperature: float
    loss_type: str
    level: Literal["token", "sequence"]
    surrogate: SurrogateSettings
    beta: float
    weighs_kl: bool
    is_on_policy: bool
    max_tokens: int
    micro_batches_per_rollout: int
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    off_policy_threshold: float | None = None
    correction: CorrectionSettings | None = None
    num_tokens: int | None = None


def grpo_loss(
    hidden: Tensor, head: nn.Module, micro_batch: MicroBatch, *, settings: GRPOLossSettings
) -> tuple[Tensor, Metrics]:
    """The weighted loss of a micro-batch, and its metrics. hidden: [positions, hidden]."""
    targets = micro_batch.targets
    assert isinstance(targets, GroupTargets)
    sequences = Sequences.of(micro_batch)
    logprobs, entropy = token_logprobs(
        hidden, head, targets.token_ids, settings.temperature, num_tokens=settings.num_tokens
    )
    bonus, entropy = entropy, entropy.detach()
    old_logprobs = logprobs.detach() if settings.is_on_policy else targets.old_logprobs
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp() if settings.level == "token" else sequences.expand(sequences.mean(log_ratio)).exp()
    correction = None
    if settings.correction is not None:
        correction = correction_ratios(old_logprobs - targets.sampler_logprobs, sequences, settings.correction)
    terms = Terms(
        logprobs=logprobs,
        log_ratio=log_ratio,
        ratio=ratio,
        advantages=targets.advantages,
        sequences=sequences,
        correction=correction,
    )
    losses = SURROGATES[settings.loss_type](terms, settings.surrogate)
    if settings.off_policy_threshold is not None:
        old = targets.sampler_logprobs if settings.correction is not None else old_logprobs
        losses = losses * _kept(sequences.mean(old - logprobs.detach()), terms, settings.off_policy_threshold)
    if settings.top_entropy_quantile < 1 and len(entropy):
        is_trained_on = entropy >= torch.quantile(entropy.float(), 1 - settings.top_entropy_quantile)
        losses, bonus = losses * is_trained_on, bonus[is_trained_on]
    if correction is not None and settings.loss_type != "vespo":
        losses = losses * correction
    metrics: dict[Metric, Tensor] = {}
    if settings.beta:
        log_difference = targets.reference_logprobs - logprobs
        kl = log_difference.exp() - log_difference - 1
        kl = kl * ratio if settings.weighs_kl else kl
        losses = losses + settings.beta * kl
        metrics[KL] = _token_mean(kl.detach())
    rows = micro_batch.row_weights
    loss = _MEANS[settings.loss_type](losses, targets, sequences, settings, rows)
    if settings.entropy_coef:
        # As TRL logs it: of means over the rollout the micro-batch's part.
        share = micro_batch.weight if _MEANS[settings.loss_type] is _of_rollout else 1.0
        metrics |= {POLICY_LOSS: share * loss.detach(), ENTROPY_COEF: loss.new_tensor(settings.entropy_coef)}
        loss = loss - settings.entropy_coef * _token_mean(bonus, rows)
    with torch.no_grad():
        metrics |= {LOSS: loss.detach(), ENTROPY: _token_mean(entropy)}
        metrics |= _clip_metrics(terms, settings)
        metrics |= sampler_differences(logprobs.detach(), targets.sampler_logprobs, targets.mask)
        if correction is not None:
            metrics |= correction_metrics(correction)
    return loss * micro_batch.weight, metrics


def _kept(mean_log_ratio: Tensor, terms: Terms, threshold: float) -> Tensor:
    """Where a token's sequence is to be trained on. mean_log_ratio: [responses]."""
    return (terms.advantages >= 0) | (terms.sequences.expand(mean_log_ratio) <= threshold)


# What kind of mean the losses of a micro-batch's tokens become, or of a regrouped one's, with its `RowWeights`, the sum
# of parts of such means: (losses [tokens], ...) -> scalar

_Mean = Callable[[Tensor, GroupTargets, Sequences, GRPOLossSettings, RowWeights | None], Tensor]


def _of_sequences(
    losses: Tensor, targets: GroupTargets, sequences: Sequences, settings: GRPOLossSettings, rows: RowWeights | None
) -> Tensor:
    return _sequence_mean(sequences.mean(losses), rows)


def _of_tokens(
    losses: Tensor, targets: GroupTargets, sequences: Sequences, settings: GRPOLossSettings, rows: RowWeights | None
) -> Tensor:
    return _token_mean(losses, rows)


def _of_places(
    losses: Tensor, targets: GroupTargets, sequences: Sequences, settings: GRPOLossSettings, rows: RowWeights | None
) -> Tensor:
    """Over all tokens that the responses could have had."""
    if rows is not None:
        return (sequences.sum(losses) * rows.of_samples).sum() / settings.max_tokens
    return losses.sum() / (sequences.count * settings.max_tokens)


def _of_rollout(
    losses: Tensor, targets: GroupTargets, sequences: Sequences, settings: GRPOLossSettings, rows: RowWeights | None
) -> Tensor:
    """The micro-batch's part of the mean over the rollout's tokens, times the number of its micro-batches."""
    losses = losses if rows is None else losses * rows.of_sum
    return (losses * targets.batch_weights).sum() * settings.micro_batches_per_rollout


def _of_sums(
    losses: Tensor, targets: GroupTargets, sequences: Sequences, settings: GRPOLossSettings, rows: RowWeights | None
) -> Tensor:
    return _sequence_mean(sequences.sum(losses), rows)


_MEANS: Mapping[str, _Mean] = MappingProxyType(
    {
        "grpo": _of_sequences,
        "sapo": _of_sequences,
        "bnpo": _of_tokens,
        "dr_grpo": _of_places,
        "dapo": _of_rollout,
        "cispo": _of_rollout,
        "vespo": _of_rollout,
        "luspo": _of_sums,
    }
)


def _sequence_mean(values: Tensor, rows: RowWeights | None) -> Tensor:
    return values.mean() if rows is None else (values * rows.of_samples).sum()


def _token_mean(values: Tensor, rows: RowWeights | None = None) -> Tensor:
    return values.sum() / max(1, len(values)) if rows is None else (values * rows.of_positions).sum()


# Metrics


def _clip_metrics(terms: Terms, settings: GRPOLossSettings) -> dict[Metric, Tensor]:
    ratio, advantages, sequences = terms.ratio, terms.advantages, terms.sequences
    bounds = settings.surrogate
    if settings.loss_type == "cispo":
        is_clipped = (ratio > bounds.epsilon_high) & (advantages > 0)
        return {CISPO_CLIPPED: _mean_at(settings.level, is_clipped.float(), sequences)}
    if settings.loss_type == "vespo":
        return {VESPO_WEIGHT: vespo_weights(terms, bounds).mean()}
    if SURROGATES[settings.loss_type] is not clipped:
        return {}
    capped = ratio if bounds.delta is None else ratio.clamp(max=bounds.delta)
    is_low = ((capped < 1 - bounds.epsilon_low) & (advantages < 0)).float()
    is_high = ((capped > 1 + bounds.epsilon_high) & (advantages > 0)).float()
    return clip_metrics(is_low, is_high, settings.level, sequences)


def clip_metrics(is_low: Tensor, is_high: Tensor, level: str, sequences: Sequences) -> dict[Metric, Tensor]:
    """Shares of what was clipped from below and above, and the extreme ones among the responses. [tokens] each."""
    of_low, of_high = sequences.mean(is_low), sequences.mean(is_high)
    if level == "token" and len(is_low):  # a response without tokens has no share
        of_low, of_high = of_low[sequences.lengths > 0], of_high[sequences.lengths > 0]
    return {
        Metric("clip_ratio/low_mean"): _mean_at(level, is_low, sequences),
        Metric("clip_ratio/high_mean"): _mean_at(level, is_high, sequences),
        Metric("clip_ratio/region_mean"): _mean_at(level, is_low + is_high, sequences),
        Metric("clip_ratio/low_min"): of_low.min(),
        Metric("clip_ratio/high_max"): of_high.max(),
    }


def _mean_at(level: str, values: Tensor, sequences: Sequences) -> Tensor:
    """Over tokens, or over responses, whose tokens then all have one value."""
    return _token_mean(values) if level == "token" else sequences.mean(values).mean()
