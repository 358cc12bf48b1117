"""Groups of responses as training consumes them, and what is reported of them by TRL's names (trl 1.12)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fuse.algorithms.batch import Experience, Positions, Segments, Targets, counted_tokens
from fuse.algorithms.dynamic_sampling import groups_with_spread
from fuse.algorithms.group_advantages import deviation, weighted_sum
from fuse.algorithms.groups import by_group
from fuse.algorithms.response_lengths import length_metrics
from fuse.sample import Sample, SampleState, SpecialTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTargets:
    """What losses without a critic compare with, all [positions]: token_ids int64, mask bool, the others fp32.

    sampler_logprobs: of the engine that sampled. old_logprobs: that ratios are to: these or the trainer's of before the
    update. reference_logprobs: zero where there is no reference.
    batch_weights: the reciprocal of the number of tokens in the rollout that a token was sampled in.
    """

    positions: ClassVar[Positions] = "tokens"
    fill: ClassVar[Mapping[str, float]] = {}

    token_ids: Tensor
    sampler_logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    batch_weights: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One rollout, scored.

    rewards: [samples, functions and penalties], NaN for none.
    token_kl: [tokens], log-ratios of policy to reference, zero without one. kl: [samples], their sums.
    token_offsets: int64 [samples + 1]; sample i has tokens token_offsets[i]:token_offsets[i + 1].
    reference_logprobs: [samples], of whole responses, those that teach nothing included; zero without a reference.
    """

    rewards: Tensor
    token_kl: Tensor
    kl: Tensor
    token_offsets: Tensor
    reference_logprobs: Tensor

    def by_token(self, values: Tensor) -> Tensor:
        """[samples] -> [tokens]."""
        return values.repeat_interleave(self.token_offsets.diff())


FloatArray = NDArray[np.float32]

Advantages = Callable[[Scored], tuple[Tensor, Tensor]]
"""A rollout -> advantages [tokens] and the deviations [samples] of the rewards that each was compared with."""

Penalty = Callable[[Tensor, Tensor], Tensor]
"""Lengths of responses, in tokens, and whether they have ended -> what is added to their rewards. [samples] each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSettings:
    """How groups are scored.

    num_generations: responses to a prompt, side by side. rollout_size: samples whose statistics are taken together.
    reward_names, reward_weights: by reward function. penalties: by name, beside them, with weight 1.
    reports_kl: whether the rollout's, or else the loss does.
    mask_truncated: whether responses without an end teach nothing. min_variance: of a group's rewards, penalties not
    counted, below which none of its responses does; None for any.
    """

    num_generations: int
    rollout_size: int
    reward_names: tuple[str, ...]
    reward_weights: tuple[float, ...]
    penalties: Mapping[str, Penalty] = field(default_factory=dict)
    mask_truncated: bool = False
    min_variance: float | None = None
    reports_kl: bool = False

    @property
    def all_names(self) -> tuple[str, ...]:
        """Of functions and penalties."""
        return (*self.reward_names, *self.penalties)

    @property
    def all_weights(self) -> tuple[float, ...]:
        return (*self.reward_weights, *(1.0 for _ in self.penalties))


def estimate(
    samples: Sequence[Sample], *, settings: GroupSettings, advantages_of: Advantages, special: SpecialTokens
) -> tuple[Experience, dict[str, float]]:
    """Advantages of an update's samples, rollout by rollout, and its metrics, which are means over the rollouts."""
    assert all(sample.state is SampleState.SCORED for sample in samples)
    size = settings.rollout_size
    ended = ended_of(samples, special)
    rewards = rewards_of(samples, ended, settings)
    filtered = without_spread(rewards, settings)
    masked = (settings.mask_truncated & ~ended) | filtered
    lengths = [0 if is_masked else sample.length for sample, is_masked in zip(samples, masked.tolist(), strict=True)]
    compared = rewards.masked_fill(filtered[:, None], torch.nan)
    sampler, reference = token_logprobs_of(samples, lengths)
    old = [one.old_logprobs[:n] for one, n in zip(samples, lengths, strict=True)]
    all_advantages, all_metrics, num_tokens = [], [], []
    for first in range(0, len(samples), size):
        rollout = slice(first, first + size)
        scored = _scored(samples[rollout], compared[rollout], old[rollout], reference[rollout])
        advantages, deviations = advantages_of(scored)
        all_advantages.append(advantages)
        num_tokens.append(max(1, sum(lengths[rollout])))
        metrics = length_metrics(samples[rollout], ended[rollout])
        metrics |= _reward_metrics(rewards[rollout], deviations.masked_fill(filtered[rollout], 0.0), settings)
        if settings.reports_kl:
            metrics["kl"] = float(scored.kl.sum()) / num_tokens[-1]
        all_metrics.append(metrics)
    counts = torch.tensor(lengths)
    targets = GroupTargets(
        token_ids=counted_tokens([sample.response_ids for sample in samples], lengths),
        sampler_logprobs=torch.from_numpy(np.concatenate(sampler)),
        old_logprobs=torch.from_numpy(np.concatenate(old)),
        reference_logprobs=torch.from_numpy(np.concatenate(reference)),
        advantages=torch.cat(all_advantages),
        batch_weights=(1 / torch.tensor(num_tokens)).repeat_interleave(size).repeat_interleave(counts),
        mask=torch.ones(sum(lengths), dtype=torch.bool),
    )
    return actor_experience(samples, lengths, targets), means(all_metrics)


def actor_experience(samples: Sequence[Sample], lengths: Sequence[int], targets: Targets) -> Experience:
    """What a policy alone is trained on: of each sample so many tokens, with these targets."""
    responses = tuple(tuple(sample.response_ids) for sample in samples)
    width = max(len(response) for response in responses)
    return Experience(
        prompts=tuple(sample.prompt_ids for sample in samples),
        responses=responses,
        lengths=tuple(lengths),
        width=width,
        segments=Segments.from_lengths(lengths, width),
        targets={"actor": targets},
    )


def rollout_metrics(
    samples: Sequence[Sample], *, num_generations: int, settings: GroupSettings, special: SpecialTokens
) -> dict[str, float]:
    """Metrics of one rollout of groups of so many samples that nothing is learnt from."""
    ended = ended_of(samples, special)
    rewards = rewards_of(samples, ended, settings)
    total = by_group(weighted_sum(rewards, torch.tensor(settings.all_weights)), num_generations)
    metrics = length_metrics(samples, ended)
    return means([metrics | _reward_metrics(rewards, deviation(total, dim=1), settings)])


def rewards_of(samples: Sequence[Sample], ended: Tensor, settings: GroupSettings) -> Tensor:
    """[samples, functions and penalties]; a sample that no function rewards has no penalty either."""
    given = torch.tensor([sample.rewards for sample in samples], dtype=torch.float32)
    lengths = torch.tensor([sample.length for sample in samples])
    has_none = given.isnan().all(dim=1)
    penalties = [penalty(lengths, ended).masked_fill(has_none, torch.nan) for penalty in settings.penalties.values()]
    return torch.cat([given, *(penalty[:, None] for penalty in penalties)], dim=1)


def without_spread(rewards: Tensor, settings: GroupSettings) -> Tensor:
    """Samples of groups that `settings.min_variance` filters, bool [samples]. rewards: of `rewards_of`."""
    if settings.min_variance is None:
        return torch.zeros(len(rewards), dtype=torch.bool)
    total = weighted_sum(rewards[:, : len(settings.reward_names)], torch.tensor(settings.reward_weights))
    keeps = groups_with_spread(total, settings.num_generations, settings.min_variance)
    return ~keeps.repeat_interleave(settings.num_generations)


def token_logprobs_of(samples: Sequence[Sample], lengths: Sequence[int]) -> tuple[list[FloatArray], list[FloatArray]]:
    """Of the first so many tokens of each, by the engine and by the reference: zero without one."""
    sampler = [np.asarray(one.logprobs[:n], dtype=np.float32) for one, n in zip(samples, lengths, strict=True)]
    reference = [
        np.zeros(n, dtype=np.float32) if one.reference_logprobs is None else one.reference_logprobs[:n]
        for one, n in zip(samples, lengths, strict=True)
    ]
    return sampler, reference


def _scored(
    samples: Sequence[Sample], rewards: Tensor, old: Sequence[FloatArray], reference: Sequence[FloatArray]
) -> Scored:
    ratios = [
        np.zeros_like(own) if one.reference_logprobs is None else own - other
        for one, own, other in zip(samples, old, reference, strict=True)
    ]
    ends = np.cumsum([0, *map(len, old)])
    whole = [0.0 if one.reference_logprobs is None else float(one.reference_logprobs.sum()) for one in samples]
    return Scored(
        rewards=rewards,
        token_kl=torch.from_numpy(np.concatenate(ratios)),
        kl=torch.tensor([float(ratio.sum()) for ratio in ratios]),
        token_offsets=torch.from_numpy(ends),
        reference_logprobs=torch.tensor(whole),
    )


def ended_of(samples: Sequence[Sample], special: SpecialTokens) -> Tensor:
    """Whether the last token of each response is an end of sequence, or padding, bool [samples]."""
    last = [sample.response_ids[sample.length - 1] for sample in samples]
    return torch.tensor([token in special.eos or token == special.pad for token in last])


def _reward_metrics(rewards: Tensor, deviations: Tensor, settings: GroupSettings) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for index, name in enumerate(settings.all_names):
        of_one = rewards[:, index]
        metrics[f"rewards/{name}/mean"] = float(of_one.nanmean())
        metrics[f"rewards/{name}/std"] = float(deviation(of_one, dim=0))
    total = weighted_sum(rewards, torch.tensor(settings.all_weights))
    return {
        **metrics,
        "reward": float(total.nanmean()),
        "reward_std": float(deviation(total, dim=0)),
        "frac_reward_zero_std": float(torch.isclose(deviations, torch.zeros(1)).float().mean()),
    }


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every metric, without what is NaN; one that is nowhere a number is left out."""
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {name: float(known.mean()) for name, of in values.items() if len(known := of[~np.isnan(of)])}
