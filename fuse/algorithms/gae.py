"""From scored samples to experience: KL-shaped rewards and generalised advantage estimation over a critic's values.

Source: Schulman et al. 2017 (arXiv 1707.06347), equation 11; where scores go, what is whitened and the metrics
`objective/*` are as in TRL's PPOTrainer (trl 1.12).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fuse.algorithms.batch import Experience, Segments, counted_tokens
from fuse.algorithms.policy_loss import PolicyTargets
from fuse.algorithms.response_lengths import length_metrics
from fuse.algorithms.value_loss import ValueTargets
from fuse.ops.shaped_gae import shaped_gae
from fuse.sample import Sample, SampleState, SpecialTokens, length_to_stop

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GAESettings:
    """How rewards are shaped and advantages estimated; see `fuse.ops.shaped_gae`.

    missing_eos_penalty: subtracted from the score of a response without end-of-sequence token.
    reward_range: bounds of scores, less that penalty and their baselines, before the KL's; None for any. Source:
        DeepSpeed-Chat's `clip_reward_value`.
    """

    kl_coef: float
    kl_estimator: Literal["k1", "k3"]
    whiten_rewards: bool
    gamma: float
    lam: float
    missing_eos_penalty: float | None
    reward_range: tuple[float, float] | None = None


def estimate(
    samples: Sequence[Sample], *, settings: GAESettings, special: SpecialTokens, width: int | None = None
) -> tuple[Experience, dict[str, float]]:
    """Shape rewards and estimate advantages over a whole batch of scored samples.

    Each sample holds `length` reference log-probabilities and length + 1 values. width: the longest generated response,
    in tokens, of a batch of which these samples are a part.

    Returns:
        The experience, and metrics: TRL's `objective/*` and `val/num_eos_tokens`, the spread of scores, how many were
        clipped, how long responses were, and what the critic explains. `objective/scores` are told unclipped, and
        without baselines.
    """
    assert all(sample.state is SampleState.SCORED for sample in samples)
    responses = tuple(tuple(sample.response_ids) for sample in samples)
    lengths = tuple(sample.length for sample in samples)
    width = max(width or 0, *(len(response) for response in responses))
    segments = Segments.from_lengths(lengths, width)

    logprobs = _flat([sample.old_logprobs for sample in samples])
    reference = _flat([sample.reference_logprobs for sample in samples])
    values = _flat([_present(sample.values)[: segments.num_values(index)] for index, sample in enumerate(samples)])
    scores = torch.tensor([_present(sample.score) for sample in samples])
    if settings.missing_eos_penalty is not None:
        finished = [_ends(response, special, width) for response in responses]
        scores = scores - settings.missing_eos_penalty * ~torch.tensor(finished)
    over_baseline = scores - torch.tensor([sample.baseline or 0.0 for sample in samples])
    rewards = over_baseline if settings.reward_range is None else over_baseline.clamp(*settings.reward_range)

    kl, advantages, returns = shaped_gae(
        logprobs,
        reference,
        rewards,
        values,
        segments.token_offsets,
        segments.value_offsets,
        kl_coef=settings.kl_coef,
        estimator=settings.kl_estimator,
        whiten_rewards=settings.whiten_rewards,
        gamma=settings.gamma,
        lam=settings.lam,
    )
    experience = Experience(
        prompts=tuple(sample.prompt_ids for sample in samples),
        responses=responses,
        lengths=lengths,
        width=width,
        segments=segments,
        targets={
            "actor": PolicyTargets(
                token_ids=counted_tokens(responses, lengths),
                old_logprobs=logprobs,
                advantages=advantages,
                mask=torch.ones(len(logprobs), dtype=torch.bool),
            ),
            "critic": ValueTargets(old_values=values, returns=returns, mask=torch.ones(len(values), dtype=torch.bool)),
        },
    )
    num_samples = len(samples)
    mean_kl = float(kl.sum()) / num_samples
    return experience, {
        "objective/kl": mean_kl,
        "objective/entropy": -float(logprobs.sum()) / num_samples,
        "objective/non_score_reward": -settings.kl_coef * mean_kl,
        "objective/rlhf_reward": float(rewards.mean()) - settings.kl_coef * mean_kl,
        "objective/scores": float(scores.mean()),
        "val/num_eos_tokens": _num_eos_tokens(responses, special, width),
        "objective/scores_std": float(scores.std()) if num_samples > 1 else 0.0,
        **_told_of_rewards(samples, over_baseline, rewards, settings),
        **length_metrics(samples, torch.tensor([_has_eos(response, special) for response in responses])),
        **_explained_variance(values, returns),
    }


def _told_of_rewards(
    samples: Sequence[Sample], over_baseline: Tensor, rewards: Tensor, settings: GAESettings
) -> dict[str, float]:
    """How far scores are above their baselines, and how many were clipped, where there are these."""
    told = {}
    if any(sample.baseline is not None for sample in samples):
        told["objective/scores_over_reference"] = float(over_baseline.mean())
    if settings.reward_range is not None:
        told["objective/scores_clipped"] = float((rewards != over_baseline).float().mean())
    return told


def _explained_variance(values: Tensor, returns: Tensor) -> dict[str, float]:
    """`critic/explained_variance`: the part of the returns' variance that the critic knew; none where they have none.

    1 for a critic that knew all, 0 for one that says the same of every state, below that for one that is worse.
    """
    variance = float(returns.var(correction=0))
    if variance == 0:
        return {}
    return {"critic/explained_variance": 1 - float((returns - values).var(correction=0)) / variance}


def _has_eos(response: Sequence[int], special: SpecialTokens) -> bool:
    return any(token in special.eos for token in response)


def _num_eos_tokens(responses: Sequence[Sequence[int]], special: SpecialTokens, width: int) -> int:
    """In the padded batch that TRL counts in, which may be filled with this token."""
    count = sum(token in special.eos for response in responses for token in response)
    if special.pad in special.eos:
        count += sum(width - len(response) for response in responses)
    return count


def _ends(response: Sequence[int], special: SpecialTokens, width: int) -> bool:
    """Whether the response, cut after its stop token and padded to `width`, holds an end-of-sequence token."""
    cut = length_to_stop(response, special.stop)
    padded = cut < width and special.pad in special.eos
    return padded or any(token in special.eos for token in response[:cut])


def _flat(rows: Sequence[object]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.float32) for row in rows]))


def _present(value: _T | None) -> _T:
    assert value is not None, "a scored sample has values and a score"
    return value
