"""From scored samples to what training consumes: rewards shaped, advantages estimated, metrics of the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fuse.algorithms import ppo
from fuse.config.ppo import PPOConfig
from fuse.ops.shaped_gae import shaped_gae
from fuse.sample import Sample, SampleState

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One rollout batch, ragged: flat tensors laid out by `segments` (see `fuse.algorithms.ppo`).

    prompts, responses: token ids per sample; a response is as generated and may run past `lengths[i]`,
        the number of its tokens that count.
    width: the longest generated response of the batch, in tokens.
    logprobs, advantages: fp32 [tokens]; values, returns: fp32 [values].
    """

    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    width: int
    segments: ppo.Segments
    logprobs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor


def prepare(
    samples: Sequence[Sample],
    config: PPOConfig,
    *,
    stop_token_id: int | None,
    pad_token_id: int,
    eos_token_id: int | None,
) -> tuple[Experience, dict[str, float]]:
    """Shape rewards and estimate advantages over a whole batch of scored samples.

    Each sample holds `length` reference log-probabilities and length + 1 values.

    Returns:
        The experience, and TRL's `objective/*` and `val/num_eos_tokens` metrics.
    """
    assert all(sample.state is SampleState.SCORED for sample in samples)
    responses = tuple(tuple(sample.response_ids) for sample in samples)
    lengths = tuple(sample.length for sample in samples)
    width = max(len(response) for response in responses)
    segments = ppo.Segments.from_lengths(lengths, width)

    logprobs = _flat([sample.logprobs[:length] for sample, length in zip(samples, lengths, strict=True)])
    reference = _flat([sample.reference_logprobs for sample in samples])
    values = _flat([_present(sample.values)[: segments.num_values(index)] for index, sample in enumerate(samples)])
    scores = torch.tensor([_present(sample.score) for sample in samples])
    if config.missing_eos_penalty is not None:
        finished = [_ends(response, eos_token_id, stop_token_id, pad_token_id, width) for response in responses]
        scores = scores - config.missing_eos_penalty * ~torch.tensor(finished)

    kl, advantages, returns = shaped_gae(
        logprobs,
        reference,
        scores,
        values,
        segments.token_offsets,
        segments.value_offsets,
        kl_coef=config.kl_coef,
        estimator=config.kl_estimator,
        whiten_rewards=config.whiten_rewards,
        gamma=config.gamma,
        lam=config.lam,
    )

    experience = Experience(
        prompts=tuple(sample.prompt_ids for sample in samples),
        responses=responses,
        lengths=lengths,
        width=width,
        segments=segments,
        logprobs=logprobs,
        advantages=advantages,
        values=values,
        returns=returns,
    )
    return experience, _objective_metrics(experience, kl, scores, config.kl_coef, pad_token_id, eos_token_id)


def _objective_metrics(
    experience: Experience,
    kl: Tensor,
    scores: Tensor,
    kl_coef: float,
    pad_token_id: int,
    eos_token_id: int | None,
) -> dict[str, float]:
    """Means over samples of per-response sums."""
    num_samples = len(experience.lengths)
    mean_kl = float(kl.sum()) / num_samples
    mean_score = float(scores.mean())
    num_eos = sum(response.count(eos_token_id) for response in experience.responses if eos_token_id is not None)
    if pad_token_id == eos_token_id:  # the padded batch that TRL counts in is filled with this token
        num_eos += sum(experience.width - len(response) for response in experience.responses)
    return {
        "objective/kl": mean_kl,
        "objective/entropy": -float(experience.logprobs.sum()) / num_samples,
        "objective/non_score_reward": -kl_coef * mean_kl,
        "objective/rlhf_reward": mean_score - kl_coef * mean_kl,
        "objective/scores": mean_score,
        "val/num_eos_tokens": num_eos,
    }


def _ends(
    response: Sequence[int], eos_token_id: int | None, stop_token_id: int | None, pad_token_id: int, width: int
) -> bool:
    """Whether the response, cut after its stop token and padded to `width`, holds the end-of-sequence token."""
    cut = ppo.length_to_stop(response, stop_token_id)
    padded = cut < width and pad_token_id == eos_token_id
    return padded or eos_token_id in response[:cut]


def _flat(rows: Sequence[object]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.float32) for row in rows]))


def _present(value: _T | None) -> _T:
    assert value is not None, "a scored sample has values and a score"
    return value
