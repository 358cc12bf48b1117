"""Scoring of finished sequences by a whole model: reference log-probabilities, values and rewards.

Sequences are sorted by length, cut into micro-batches that cost least, and padded on the right: plain causal attention
then needs no mask. Heads are applied only to the positions asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from fuse.intrastage.packing import Packing, last_hidden_state, selected, token_ids
from fuse.intrastage.transformers_stage import head_of
from fuse.micro_batch import MicroBatch
from fuse.roles import ScoreKind, role_of
from fuse.training.advantage_model import ADVANTAGE, is_advantage_model
from fuse.training.reading import MEAN_HIDDEN, SCORE, VALUES, Reading, TokenSequence, log_probabilities

_BATCH_TOKENS = 128
"""What a micro-batch costs beside its tokens, in tokens: 70 on a CPU core for a Llama of 4 x 256."""


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
    return _read_all(model, sequences, reading_of(kind, settings, model.config), settings.limit, settings.autocast)


def reading_of(kind: ScoreKind, settings: ScoringSettings, config: PretrainedConfig | None) -> Reading:
    """How a model is read for what it is to say. config: of the model; needed for scores alone."""
    if kind == "reference_logprobs":
        return log_probabilities(settings.temperature, settings.num_tokens)
    if kind == "values":
        return VALUES
    assert config is not None
    return _score_of(config)


def reference_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    temperature: float,
    *,
    num_tokens: int | None = None,
    limit: MicroBatchLimit = MicroBatchLimit(),
    autocast: torch.dtype | None = None,
) -> list[NDArray[np.float32]]:
    """As `log_probabilities` has them, of each sequence.

    Raises: ValueError for a model without a plain head, or a temperature that is not positive.
    """
    return _read_all(model, sequences, log_probabilities(temperature, num_tokens), limit, autocast)


def values(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, limit: MicroBatchLimit = MicroBatchLimit()
) -> list[NDArray[np.float32]]:
    """As of `VALUES`, of each sequence.

    Raises: ValueError for a model without a head of one output.
    """
    return _read_all(model, sequences, VALUES, limit)


def scores(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, limit: MicroBatchLimit = MicroBatchLimit()
) -> list[float]:
    """The score of a reward model, or of an advantage model, for each sequence.

    Raises: ValueError for a model that is neither.
    """
    return _read_all(model, sequences, _score_of(model.config), limit)


def mean_hidden_states(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], *, limit: MicroBatchLimit = MicroBatchLimit()
) -> list[NDArray[np.float32]]:
    """As of `MEAN_HIDDEN`, of each sequence."""
    return _read_all(model, sequences, MEAN_HIDDEN, limit)


def _score_of(config: PretrainedConfig) -> Reading:
    return ADVANTAGE if is_advantage_model(config) else SCORE


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


def laid_out(sequences: Sequence[TokenSequence], reading: Reading) -> MicroBatch:
    """Sequences side by side, the longest first; heads see their rows. targets: the tokens of all responses."""
    width = len(sequences[0])
    tokens = np.zeros((len(sequences), width), dtype=np.int64)
    selected: list[int] = []
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = [*sequence.prompt_ids, *sequence.response_ids]
        selected.extend(row * width + position for position in reading.rows(sequence))
    return MicroBatch(
        input_ids=torch.from_numpy(tokens),
        head_index=torch.tensor(selected, dtype=torch.int64),
        targets=torch.tensor([token for one in sequences for token in one.response_ids], dtype=torch.int64),
        lengths=tuple(map(len, sequences)),
    )


def results(read: Tensor, sequences: Sequence[TokenSequence], reading: Reading) -> list[Any]:
    """What is made of a micro-batch's rows [selected, ...], for each sequence."""
    counts = [len(reading.rows(sequence)) for sequence in sequences]
    return [reading.result(of_one) for of_one in np.split(read.cpu().numpy(), np.cumsum(counts)[:-1])]


def _read_all(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    reading: Reading,
    limit: MicroBatchLimit,
    autocast: torch.dtype | None = None,
) -> list[Any]:
    """What is made of the final hidden states of the rows asked for, for each sequence."""
    assert not model.training
    base: Any = model.base_model
    head = head_of(model)
    said: dict[int, Any] = {}
    with torch.inference_mode(), _precision(model, autocast):
        for indices in micro_batches([len(sequence) for sequence in sequences], limit):
            own = [sequences[index] for index in indices]
            micro_batch = laid_out(own, reading).to(model.device)
            packing = Packing.of(micro_batch, model)
            hidden = model.get_input_embeddings()(token_ids(micro_batch, packing))
            # As in training: the residual stream is in the type of the computation.
            hidden = hidden.to(autocast or hidden.dtype)
            hidden = last_hidden_state(base, hidden, micro_batch, packing)
            read = reading.read(selected(hidden, micro_batch, packing), head, micro_batch)
            said.update(zip(indices, results(read, own, reading), strict=True))
    return [said[index] for index in range(len(sequences))]


def _precision(model: PreTrainedModel, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if autocast is None else torch.autocast(model.device.type, dtype=autocast)
