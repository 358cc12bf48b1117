"""Online DPO: of each prompt's responses the best is preferred to the worst, and pairs of these are trained on.

Sources: Guo et al. 2024, Direct Language Model Alignment from Online AI Feedback (arXiv 2402.04792), for two responses;
Noukhovitch et al. 2024, Asynchronous RLHF (arXiv 2410.18252), for groups; the loss is that of `online_dpo_loss`.

Deviations from TRL: a prompt whose responses have equal rewards, or none, teaches nothing, where TRL prefers the first;
its pair is one response twice, which counts in the mean and has no gradient. Log-probabilities are of the distribution
that is sampled from, as in Asynchronous RLHF; TRL's are of temperature 1. Gradients of a step's micro-batches are
averaged; TRL adds them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.batch import Experience, Positions, counted_tokens
from fuse.algorithms.group_advantages import weighted_sum
from fuse.algorithms.group_batch import (
    GroupSettings,
    actor_experience,
    ended_of,
    means,
    rewards_of,
    rollout_metrics,
    token_logprobs_of,
    without_spread,
)
from fuse.algorithms.groups import by_group
from fuse.algorithms.grpo_loss import ENTROPY, LOSS
from fuse.algorithms.online_dpo_loss import Pairs, best_and_worst, dpo_loss
from fuse.algorithms.policy_loss import sampler_differences
from fuse.algorithms.sequences import Sequences
from fuse.micro_batch import Metrics, MicroBatch
from fuse.ops.logprob import token_logprobs
from fuse.sample import Sample, SampleState, SpecialTokens

PAIR = 2
"""Samples side by side in what is trained on: the chosen one and the rejected one. A micro-batch has both or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTargets:
    """What the loss compares with, all [positions]: token_ids int64, mask bool, the others fp32."""

    positions: ClassVar[Positions] = "tokens"
    fill: ClassVar[Mapping[str, float]] = {}

    token_ids: Tensor
    sampler_logprobs: Tensor
    reference_logprobs: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineDPOSettings:
    """group: what is compared. beta, form: see `dpo_loss`. temperature, num_tokens: of sampling."""

    group: GroupSettings
    beta: float
    form: Literal["sigmoid", "ipo"]
    temperature: float
    num_tokens: int | None = None


def online_dpo(settings: OnlineDPOSettings, special: SpecialTokens) -> Algorithm:
    """Online DPO with these settings, on responses that these tokens end."""
    return Algorithm(
        estimate=partial(estimate_pairs, settings=settings.group, special=special),
        losses={
            "actor": partial(
                pair_loss,
                beta=settings.beta,
                form=settings.form,
                temperature=settings.temperature,
                num_tokens=settings.num_tokens,
            )
        },
        targets={"actor": PairTargets},
        units={"actor": PAIR},
    )


def estimate_pairs(
    samples: Sequence[Sample], *, settings: GroupSettings, special: SpecialTokens
) -> tuple[Experience, dict[str, float]]:
    """One pair of every group: rows 2 i and 2 i + 1 are the best and the worst response to prompt i. And metrics."""
    assert all(sample.state is SampleState.SCORED for sample in samples)
    rewards = rewards_of(samples, ended_of(samples, special), settings)
    scores = weighted_sum(rewards, torch.tensor(settings.all_weights))
    compared = scores.masked_fill(without_spread(rewards, settings), torch.nan)
    pairs = pairs_of_all(compared, settings.num_generations)
    paired = [samples[row] for row in torch.stack([pairs.chosen, pairs.rejected], dim=1).flatten().tolist()]
    lengths = [sample.length for sample in paired]
    sampler, reference = token_logprobs_of(paired, lengths)
    targets = PairTargets(
        token_ids=counted_tokens([sample.response_ids for sample in paired], lengths),
        sampler_logprobs=torch.from_numpy(np.concatenate(sampler)),
        reference_logprobs=torch.from_numpy(np.concatenate(reference)),
        mask=torch.ones(sum(lengths), dtype=torch.bool),
    )
    return actor_experience(paired, lengths, targets), _metrics(samples, scores, pairs, settings, special)


def pairs_of_all(scores: Tensor, num_generations: int) -> Pairs:
    """Of every group `best_and_worst`; of one without scores its first response, twice."""
    scored = ~by_group(scores, num_generations).isnan().all(dim=1)
    of_none = scores.masked_fill(~scored.repeat_interleave(num_generations), 0.0)
    return best_and_worst(of_none, num_generations)


def pair_loss(
    hidden: Tensor,
    head: nn.Module,
    micro_batch: MicroBatch,
    *,
    beta: float,
    form: Literal["sigmoid", "ipo"],
    temperature: float,
    num_tokens: int | None = None,
) -> tuple[Tensor, Metrics]:
    """The weighted loss of a micro-batch of pairs, and its metrics. hidden: [positions, hidden].

    num_tokens: as in PPO's loss.
    """
    targets = micro_batch.targets
    assert isinstance(targets, PairTargets)
    sequences = Sequences.of(micro_batch)
    assert sequences.count % PAIR == 0, "pairs stay together"
    logprobs, entropy = token_logprobs(hidden, head, targets.token_ids, temperature, num_tokens=num_tokens)
    chosen = torch.arange(0, sequences.count, PAIR, device=logprobs.device)
    loss, metrics = dpo_loss(
        sequences.sum(logprobs),
        sequences.sum(targets.reference_logprobs),
        Pairs(chosen, chosen + 1),
        beta=beta,
        form=form,
        weights=None if micro_batch.row_weights is None else PAIR * micro_batch.row_weights.of_samples[chosen],
    )
    return loss * micro_batch.weight, {
        LOSS: loss.detach(),
        ENTROPY: entropy.detach().sum() / max(1, len(entropy)),
        **metrics,
        **sampler_differences(logprobs.detach(), targets.sampler_logprobs, targets.mask),
    }


def _metrics(
    samples: Sequence[Sample], scores: Tensor, pairs: Pairs, settings: GroupSettings, special: SpecialTokens
) -> dict[str, float]:
    """Means over the rollouts, as of the other algorithms without a critic, and TRL's of pairs."""
    size, num_generations = settings.rollout_size, settings.num_generations
    rollouts = [samples[first : first + size] for first in range(0, len(samples), size)]
    metrics = means(
        [
            rollout_metrics(rollout, num_generations=num_generations, settings=settings, special=special)
            for rollout in rollouts
        ]
    )
    sampler, reference = token_logprobs_of(samples, [sample.length for sample in samples])
    kl = sum(float((own - other).sum()) for own, other in zip(sampler, reference, strict=True))
    margins = scores[pairs.chosen] - scores[pairs.rejected]
    of_pairs = {"kl": kl / sum(map(len, sampler)), "objective/scores_margin": float(margins.nanmean())}
    return metrics | {name: value for name, value in of_pairs.items() if value == value}  # NaN where none is scored
