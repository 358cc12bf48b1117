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
from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.intrastage.no_cache import NoCache
from fuse.intrastage.stage import Readout
from fuse.intrastage.transformers_stage import head_of
from fuse.micro_batch import MicroBatch
from fuse.ops.logprob import token_logprobs
from fuse.roles import ScoreKind, role_of

_LOGIT_ROWS = 1024
"""Rows of logits held at once."""
_BATCH_TOKENS = 128
"""What a micro-batch costs beside its tokens, in tokens: 70 on a CPU core for a Llama of 4 x 256."""

Rows = Callable[["TokenSequence"], range]
"""Positions of a sequence that a head sees."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt of at least one token and the response to it.

    rewarded_ids: what reward models read in place of these whose tokens are others, by role. sample_id: whose it is.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    rewarded_ids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    sample_id: int | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def read_by(self, role: str) -> TokenSequence:
        """What this model reads."""
        if role not in self.rewarded_ids:
            return self
        return TokenSequence(self.rewarded_ids[role], (), sample_id=self.sample_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLimit:
    """How much a micro-batch may hold; `max_tokens` counts padding. One longer sequence is a micro-batch of its own."""

    max_samples: int = 64
    max_tokens: int = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSettings:
    """How models score.

    temperature, num_tokens: of the sampling. autocast: the type to compute in; None for the model's own.
    is_sharded: models score through pipelines, of which each device has a share, and not by a copy on every device.
    """

    temperature: float
    limit: MicroBatchLimit
    autocast: torch.dtype | None
    num_tokens: int | None = None
    is_sharded: bool = False


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

    def read(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
        return _logprobs(hidden, head, micro_batch.targets, temperature, num_tokens)

    return _read_all(model, sequences, _token_rows, read, limit, autocast)


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
        return _value_rows(sequence)[:max_response_tokens]

    return _read_all(model, sequences, rows, _one_output, limit, autocast)


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
    return [float(score[0]) for score in _read_all(model, sequences, _last_row, _one_output, limit, autocast)]


def rows_of(kind: ScoreKind) -> Rows:
    """Of which positions of a sequence a model says something of this kind."""
    return {"reference_logprobs": _token_rows, "values": _value_rows, "scores": _last_row}[kind]


def readout_of(kind: ScoreKind, settings: ScoringSettings) -> Readout:
    """What a head says of hidden states of these positions, of this kind."""
    if kind != "reference_logprobs":
        return _one_output

    def read(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
        return _logprobs(hidden, head, micro_batch.targets, settings.temperature, settings.num_tokens)

    return read


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


def laid_out(sequences: Sequence[TokenSequence], rows: Rows) -> MicroBatch:
    """Sequences side by side, the longest first; heads see their rows. targets: the tokens of all responses."""
    width = len(sequences[0])
    tokens = np.zeros((len(sequences), width), dtype=np.int64)
    selected: list[int] = []
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = [*sequence.prompt_ids, *sequence.response_ids]
        selected.extend(row * width + position for position in rows(sequence))
    return MicroBatch(
        input_ids=torch.from_numpy(tokens),
        head_index=torch.tensor(selected, dtype=torch.int64),
        targets=torch.tensor([token for one in sequences for token in one.response_ids], dtype=torch.int64),
    )


def unpacked(flat: Tensor, sequences: Sequence[TokenSequence], rows: Rows) -> list[NDArray[np.float32]]:
    """Cut a micro-batch's results [selected] into one array per sequence."""
    counts = [len(rows(sequence)) for sequence in sequences]
    return np.split(flat.cpu().numpy(), np.cumsum(counts)[:-1])


def _token_rows(sequence: TokenSequence) -> range:
    return range(len(sequence.prompt_ids) - 1, len(sequence) - 1)


def _value_rows(sequence: TokenSequence) -> range:
    return range(len(sequence.prompt_ids) - 1, len(sequence))


def _last_row(sequence: TokenSequence) -> range:
    return range(len(sequence) - 1, len(sequence))


def _logprobs(hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float, num_tokens: int | None) -> Tensor:
    logprobs, _ = token_logprobs(hidden, head, targets, temperature, num_tokens=num_tokens, chunk_tokens=_LOGIT_ROWS)
    return logprobs


def _one_output(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
    outputs: Tensor = head(hidden).float()
    if outputs.shape[-1] != 1:
        raise ValueError(
            f"a model gives {outputs.shape[-1]} scores per token where one is needed: load it with num_labels=1"
        )
    return outputs.squeeze(-1)


def _read_all(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    rows: Rows,
    read: Readout,
    limit: MicroBatchLimit,
    autocast: torch.dtype | None,
) -> list[NDArray[np.float32]]:
    """What is read of the final hidden states of the rows asked for, for each sequence."""
    assert not model.training
    base: Any = model.base_model
    head = head_of(model)
    results: dict[int, NDArray[np.float32]] = {}
    with torch.inference_mode(), _precision(model, autocast):
        for indices in micro_batches([len(sequence) for sequence in sequences], limit):
            own = [sequences[index] for index in indices]
            micro_batch = laid_out(own, rows).to(model.device)
            hidden = model.get_input_embeddings()(micro_batch.input_ids)
            # As in training: the residual stream is in the type of the computation.
            hidden = hidden.to(autocast or hidden.dtype)
            hidden = base(inputs_embeds=hidden, past_key_values=NoCache(), use_cache=False).last_hidden_state
            flat = read(micro_batch.selected(hidden), head, micro_batch)
            results.update(zip(indices, unpacked(flat, own, rows), strict=True))
    return [results[index] for index in range(len(sequences))]


def _precision(model: PreTrainedModel, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if autocast is None else torch.autocast(model.device.type, dtype=autocast)
