"""Micro-batches of an experience: token tensors for the stages, targets for the losses, by role that trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuse.algorithms.batch import TOKEN_IDS, Experience, Targets
from fuse.intrastage.cost_profile import shape_of
from fuse.micro_batch import MicroBatch


def ragged(
    experience: Experience, indices: Sequence[int], weight: float, *, packs: bool = False
) -> dict[str, MicroBatch]:
    """Samples `indices`, right-padded; heads see only what counts. packs: models may leave padding out."""
    sequences = [
        (*experience.prompts[index], *experience.responses[index][: experience.lengths[index]]) for index in indices
    ]
    num_tokens = max(len(sequence) for sequence in sequences)
    input_ids = np.zeros((len(indices), num_tokens), dtype=np.int64)  # of which numpy reads a row five times as fast
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence

    # The hidden state at token prompt + t - 1 predicts response token t and its value.
    first = [row * num_tokens + len(experience.prompts[index]) - 1 for row, index in enumerate(indices)]
    made = {}
    for role, targets in experience.targets.items():
        starts, counts = _segments(experience.segments.offsets(targets.positions), indices)
        rows = _ranges(starts, counts)
        made[role] = MicroBatch(
            input_ids=torch.from_numpy(input_ids),
            head_index=_ranges(first, counts),
            targets=_map_columns(targets, partial(_take, rows=rows)),
            weight=weight,
            lengths=tuple(map(len, sequences)) if packs else None,
        )
    return made


def padded(experience: Experience, indices: Sequence[int], weight: float, pad_token_id: int) -> dict[str, MicroBatch]:
    """The same samples as TRL lays them out: prompts left-padded, every response `width` positions wide.

    Losses are unchanged (masked); what is averaged over padding, as TRL's entropy is, becomes comparable.
    """
    context = max(len(prompt) for prompt in experience.prompts)
    width = experience.width
    token_ids = torch.full((len(indices), context + width), pad_token_id, dtype=torch.int64)
    for row, index in enumerate(indices):
        prompt, response = experience.prompts[index], experience.responses[index]
        token_ids[row, context - len(prompt) : context] = torch.tensor(prompt)
        token_ids[row, context : context + len(response)] = torch.tensor(response, dtype=torch.int64)
    attention_mask = token_ids != pad_token_id
    position_ids = attention_mask.cumsum(1) - attention_mask.long()
    input_ids = token_ids.masked_fill(~attention_mask, 0)
    first = [row * (context + width) + context - 1 for row in range(len(indices))]
    head_index = _ranges(first, [width] * len(indices))

    made = {}
    for role, targets in experience.targets.items():
        starts, counts = _segments(experience.segments.offsets(targets.positions), indices)
        rows = _ranges(starts, counts)
        mask = (torch.arange(width) < torch.tensor(counts)[:, None]).flatten()

        laid_out: Any = _map_columns(targets, partial(_scatter, rows=rows, mask=mask, fill=targets.fill))
        if hasattr(laid_out, TOKEN_IDS):
            laid_out = replace(laid_out, **{TOKEN_IDS: token_ids[:, context:].flatten()})
        made[role] = MicroBatch(
            input_ids=input_ids,
            head_index=head_index,
            targets=laid_out,
            weight=weight,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
    return made


def _map_columns(targets: Targets, function: Callable[[str, Tensor], Tensor]) -> Targets:
    """Targets of the same kind with function(name, tensor) in place of every tensor."""
    untyped: Any = targets
    changed: Targets = replace(
        untyped, **{field.name: function(field.name, getattr(untyped, field.name)) for field in fields(untyped)}
    )
    return changed


def _take(name: str, values: Tensor, *, rows: Tensor) -> Tensor:
    return values[rows]


def _scatter(name: str, values: Tensor, *, rows: Tensor, mask: Tensor, fill: Mapping[str, float]) -> Tensor:
    result = values.new_full(mask.shape, fill.get(name, 0.0))
    result[mask] = values[rows]
    return result


def rows_of_samples(offsets: Tensor, indices: Sequence[int]) -> Tensor:
    """Rows of the flat tensors that samples `indices` own, in their order."""
    return _ranges(*_segments(offsets, indices))


def _segments(offsets: Tensor, indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where those of the samples start, and how many rows they have."""
    bounds = offsets.tolist()
    return [bounds[index] for index in indices], [bounds[index + 1] - bounds[index] for index in indices]


def _ranges(starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """All numbers of all ranges, which begin there and have so many."""
    begins = np.cumsum(counts) - counts
    shifts = np.repeat(np.asarray(starts, dtype=np.int64) - begins, counts)
    return torch.from_numpy(np.arange(len(shifts)) + shifts)


def index_of_largest(micro_batches: Sequence[MicroBatch]) -> int:
    """Index of the one with most tokens that are computed; of several the last, which finds memory warm."""
    return max(range(len(micro_batches)), key=lambda index: (shape_of(micro_batches[index]).size, index))
