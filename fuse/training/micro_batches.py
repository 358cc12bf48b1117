"""Micro-batches of an experience: token tensors for the stages, targets for the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.algorithms.experience import Experience
from fuse.algorithms.ppo import INVALID_LOGPROB
from fuse.intrastage.stage import MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTargets:
    """What the policy loss compares with, all [positions]; see `fuse.algorithms.ppo.policy_loss`."""

    token_ids: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """What the value loss compares with, all [positions]; see `fuse.algorithms.ppo.value_loss`."""

    old_values: Tensor
    returns: Tensor
    mask: Tensor


def ragged(experience: Experience, indices: Sequence[int]) -> tuple[MicroBatch, MicroBatch]:
    """The actor's and the critic's micro-batch of samples `indices`, right-padded; heads see only what counts."""
    sequences = [
        (*experience.prompts[index], *experience.responses[index][: experience.lengths[index]]) for index in indices
    ]
    num_tokens = max(len(sequence) for sequence in sequences)
    input_ids = torch.zeros(len(indices), num_tokens, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)

    # The hidden state at token prompt + t - 1 predicts response token t and its value.
    first = [row * num_tokens + len(experience.prompts[index]) - 1 for row, index in enumerate(indices)]
    segments = experience.segments
    token_rows = _rows(segments.token_offsets, indices)
    value_rows = _rows(segments.value_offsets, indices)
    policy = PolicyTargets(
        token_ids=torch.tensor(
            [token for index in indices for token in experience.responses[index][: experience.lengths[index]]],
            dtype=torch.int64,
        ),
        old_logprobs=experience.logprobs[token_rows],
        advantages=experience.advantages[token_rows],
        mask=torch.ones(len(token_rows), dtype=torch.bool),
    )
    value = ValueTargets(
        old_values=experience.values[value_rows],
        returns=experience.returns[value_rows],
        mask=torch.ones(len(value_rows), dtype=torch.bool),
    )
    token_counts = [experience.lengths[index] for index in indices]
    value_counts = [segments.num_values(index) for index in indices]
    return (
        MicroBatch(input_ids=input_ids, head_index=_ranges(first, token_counts), targets=policy),
        MicroBatch(input_ids=input_ids, head_index=_ranges(first, value_counts), targets=value),
    )


def padded(experience: Experience, indices: Sequence[int], pad_token_id: int) -> tuple[MicroBatch, MicroBatch]:
    """The same samples as TRL lays them out: prompts left-padded, every response `width` positions wide.

    Losses are unchanged (masked); what is averaged over padding, as TRL's entropy is, becomes comparable.
    """
    context = max(len(prompt) for prompt in experience.prompts)
    width = experience.width
    token_ids = torch.full((len(indices), context + width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros(len(indices), width, dtype=torch.bool)
    value_mask = torch.zeros(len(indices), width, dtype=torch.bool)
    for row, index in enumerate(indices):
        prompt, response = experience.prompts[index], experience.responses[index]
        token_ids[row, context - len(prompt) : context] = torch.tensor(prompt)
        token_ids[row, context : context + len(response)] = torch.tensor(response, dtype=torch.int64)
        mask[row, : experience.lengths[index]] = True
        value_mask[row, : experience.segments.num_values(index)] = True
    mask, value_mask = mask.flatten(), value_mask.flatten()

    token_rows = _rows(experience.segments.token_offsets, indices)
    value_rows = _rows(experience.segments.value_offsets, indices)
    policy = PolicyTargets(
        token_ids=token_ids[:, context:].flatten(),
        old_logprobs=_scatter(experience.logprobs[token_rows], mask, INVALID_LOGPROB),
        advantages=_scatter(experience.advantages[token_rows], mask, 0.0),
        mask=mask,
    )
    value = ValueTargets(
        old_values=_scatter(experience.values[value_rows], value_mask, 0.0),
        returns=_scatter(experience.returns[value_rows], value_mask, 0.0),
        mask=value_mask,
    )
    attention_mask = token_ids != pad_token_id
    position_ids = attention_mask.cumsum(1) - attention_mask.long()
    input_ids = token_ids.masked_fill(~attention_mask, 0)
    first = [row * (context + width) + context - 1 for row in range(len(indices))]
    head_index = _ranges(first, [width] * len(indices))

    def micro_batch(targets: PolicyTargets | ValueTargets) -> MicroBatch:
        return MicroBatch(
            input_ids=input_ids,
            head_index=head_index,
            targets=targets,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )

    return micro_batch(policy), micro_batch(value)


def _rows(offsets: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows of the flat tensors that samples `indices` own, in their order."""
    return _ranges([int(offsets[index]) for index in indices], [int(offsets[i + 1] - offsets[i]) for i in indices])


def _ranges(starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    return torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])


def _scatter(values: Tensor, mask: Tensor, fill: float) -> Tensor:
    result = values.new_full(mask.shape, fill)
    result[mask] = values
    return result
