"""Scoring of finished sequences by a whole model: reference log-probabilities, values and rewards.

Sequences are sorted by length, cut into micro-batches that cost least, and padded on the right: plain causal attention
then needs no mask. Heads are applied only to the positions asked for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fuse.intrastage.transformers_stage import head_of
from fuse.ops.logprob import token_logprobs
from fuse.roles import ScoreKind, role_of

_LOGIT_ROWS = 1024
"""Rows of logits held at once."""
_BATCH_TOKENS = 128
"""What a micro-batch costs beside its tokens, in tokens: 70 on a CPU core for a Llama of 4 x 256."""

_Rows = Callable[["TokenSequence"], range]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt of at least one token and the response to it.

    rewarded_ids: what reward models read in place of these whose tokens are others, by role.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    rewarded_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def read_by(self, role: str) -> TokenSequence:
        """What this model reads."""
        return TokenSequence(self.rewarded_ids[role], ()) if role in self.rewarded_ids else self


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLimit:
    """How much a micro-batch may hold; `max_tokens` counts padding. One longer sequence is a micro-batch of its own."""

    max_samples: int = 64
    max_tokens: int = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSettings:
    """How models score.

    temperature, num_tokens: of the sampling. autocast: the type to compute in; None for the model's own.
    """

    temperature: float
    limit: MicroBatchLimit
    autocast: torch.dtype | None
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What the scoring models say of a sequence of n response tokens; None for what no model of the run says.

    reference_logprobs: [n]. values: [n + 1], before each token and after the last. scores: by role.
    """

    reference_logprobs: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None
    scores: Mapping[str, float] | None = None


def inferences(said: Mapping[str, Sequence[Any]]) -> list[Inference]:
    """What models say of each sequence. said: by role, of all sequences."""
    made = []
    for of_one in zip(*said.values(), strict=True):
        fields: dict[str, Any] = {}
        for role, one in zip(said, of_one, strict=True):
            kind = role_of(role).scores
            assert kind is not None
            if kind == "scores":
                fields.setdefault(kind, {})[role] = one
            else:
                fields[kind] = one
        made.append(Inference(**fields))
    return made


def score(
    kind: ScoreKind, model: PreTrainedModel, sequences: Sequence[TokenSequence], settings: ScoringSettings
) -> Sequence[NDArray[np.float32] | float]:
    """What a model says of each sequence, of this kind."""
    limit, autocast = settings.limit, settings.autocast
    if kind == "reference_logprobs":
        return reference_logprobs(
            model, sequences, settings.temperature, num_tokens=settings.num_tokens, limit=limit, autocast=autocast
        )
    if kind == "values":
        return values(model, sequences, sys.maxsize, limit=limit, autocast=autocast)
    return scores(model, sequences, limit=limit, autocast=autocast)


def reference_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    temperature: float,
    *,
    num_tokens: int | None = None,
    limit: MicroBatchLimit = MicroBatchLimit(),
    autocast: torch.dtype | None = None,
) -> list[NDArray[np.float32]]:
    """Log-probability of each response token at `temperature`: for each sequence [response tokens].

    num_tokens: that a response may consist of, the first of the vocabulary; None for all.

    Raises: ValueError for a model without a plain head, or a temperature that is not positive.
    """

    def rows(sequence: TokenSequence) -> range:
        return range(len(sequence.prompt_ids) - 1, len(sequence) - 1)

    head = head_of(model)
    results: dict[int, NDArray[np.float32]] = {}
    with torch.inference_mode(), _precision(model, autocast):
        for indices, hidden in _selected_hidden(model, sequences, rows, limit, autocast):
            tokens = [token for index in indices for token in sequences[index].response_ids]
            targets = torch.tensor(tokens, dtype=torch.int64, device=model.device)
            logprobs, _ = token_logprobs(
                hidden, head, targets, temperature, num_tokens=num_tokens, chunk_tokens=_LOGIT_ROWS
            )
            results.update(_unpack(logprobs, indices, sequences, rows))
    return [results[index] for index in range(len(sequences))]


def values(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    max_response_tokens: int,
    *,
    limit: MicroBatchLimit = MicroBatchLimit(),
    autocast: torch.dtype | None = None,
) -> list[NDArray[np.float32]]:
    """Value before each response token and after the last: for each sequence [min(response tokens + 1, the maximum)].

    The value at response index t is the score head on the hidden state of the token before it.

    Raises: ValueError for a model without a head of one output.
    """

    def rows(sequence: TokenSequence) -> range:
        first = len(sequence.prompt_ids) - 1
        return range(first, first + min(len(sequence.response_ids) + 1, max_response_tokens))

    return _scored(model, sequences, rows, limit, autocast)


def scores(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    limit: MicroBatchLimit = MicroBatchLimit(),
    autocast: torch.dtype | None = None,
) -> list[float]:
    """The score head at the last token of prompt and response.

    Raises: ValueError for a model without a head of one output.
    """

    def rows(sequence: TokenSequence) -> range:
        return range(len(sequence) - 1, len(sequence))

    return [float(score[0]) for score in _scored(model, sequences, rows, limit, autocast)]


def micro_batches(lengths: Sequence[int], limit: MicroBatchLimit) -> Iterator[list[int]]:
    """Indices of sequences by descending length, cut within the limit so that the micro-batches cost least.

    One costs its padded tokens and `_BATCH_TOKENS` more. By dynamic programming over the sequences in order.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    longest = np.array([lengths[index] for index in order], dtype=np.int64)
    costs = np.zeros(len(order) + 1)  # of the first so many
    firsts = [0] * (len(order) + 1)  # where the last micro-batch of the first so many begins
    for end in range(1, len(order) + 1):
        begins = np.arange(max(0, end - limit.max_samples), end)
        tokens = (end - begins) * longest[begins]
        allowed = (tokens <= limit.max_tokens) | (begins == end - 1)
        candidates = np.where(allowed, costs[begins] + tokens + _BATCH_TOKENS, np.inf)
        best = int(candidates.argmin())
        costs[end], firsts[end] = candidates[best], int(begins[best])
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(firsts[cuts[-1]])
    for begin, end in pairwise(cuts[::-1]):
        yield order[begin:end]


def _scored(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    rows: _Rows,
    limit: MicroBatchLimit,
    autocast: torch.dtype | None,
) -> list[NDArray[np.float32]]:
    """The one-output head on the rows asked for, for each sequence."""
    head = head_of(model)
    results: dict[int, NDArray[np.float32]] = {}
    with torch.inference_mode(), _precision(model, autocast):
        for indices, hidden in _selected_hidden(model, sequences, rows, limit, autocast):
            outputs: Tensor = head(hidden).float()
            if outputs.shape[-1] != 1:
                raise ValueError(
                    f"{type(model).__name__} gives {outputs.shape[-1]} scores per token where one is needed: "
                    f"load it with num_labels=1"
                )
            results.update(_unpack(outputs.squeeze(-1), indices, sequences, rows))
    return [results[index] for index in range(len(sequences))]


def _selected_hidden(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    rows: _Rows,
    limit: MicroBatchLimit,
    autocast: torch.dtype | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Per micro-batch, the indices of its sequences and the final hidden states [selected, hidden] of their rows."""
    assert not model.training
    base: Any = model.base_model
    for indices in micro_batches([len(sequence) for sequence in sequences], limit):
        width = len(sequences[indices[0]])
        tokens = np.zeros((len(indices), width), dtype=np.int64)
        selected: list[int] = []
        for row, index in enumerate(indices):
            sequence = sequences[index]
            tokens[row, : len(sequence)] = [*sequence.prompt_ids, *sequence.response_ids]
            selected.extend(row * width + position for position in rows(sequence))
        hidden = model.get_input_embeddings()(torch.from_numpy(tokens).to(model.device))
        # As in training: the residual stream is in the type of the computation.
        hidden = base(inputs_embeds=hidden.to(autocast or hidden.dtype), use_cache=False).last_hidden_state
        yield indices, hidden.flatten(0, 1)[torch.tensor(selected, dtype=torch.int64, device=model.device)]


def _unpack(
    flat: Tensor, indices: Sequence[int], sequences: Sequence[TokenSequence], rows: _Rows
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Cut the micro-batch's results [selected] into one array per sequence."""
    counts = [len(rows(sequences[index])) for index in indices]
    arrays = np.split(flat.cpu().numpy(), np.cumsum(counts)[:-1])
    return zip(indices, arrays, strict=True)


def _precision(model: PreTrainedModel, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if autocast is None else torch.autocast(model.device.type, dtype=autocast)
