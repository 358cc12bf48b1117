"""What a model is asked of a sequence: the positions that its head sees, what it says there, what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fuse.intrastage.stage import Readout
from fuse.micro_batch import MicroBatch
from fuse.ops.logprob import token_logprobs

_LOGIT_ROWS = 1024
"""Rows of logits held at once."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt of at least one token and the response to it.

    rewarded_ids: prompt and response as reward models read them whose tokens are others, by role. sample_id: whose it
    is.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    rewarded_ids: Mapping[str, tuple[Sequence[int], Sequence[int]]] = field(default_factory=dict)
    sample_id: int | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    def read_by(self, role: str) -> TokenSequence:
        """What this model reads."""
        if role not in self.rewarded_ids:
            return self
        return TokenSequence(*self.rewarded_ids[role], sample_id=self.sample_id)


@dataclass(frozen=True, slots=True)
class Reading:
    """What is read, in three steps.

    rows: the positions of a sequence that the head sees. read: what it says there of a micro-batch, [selected, ...].
    result: what is made of one sequence's rows of that.
    """

    rows: Callable[[TokenSequence], Sequence[int]]
    read: Readout
    result: Callable[[NDArray[np.float32]], Any]


def log_probabilities(temperature: float, num_tokens: int | None = None) -> Reading:
    """Of each response token at `temperature`: [response tokens].

    num_tokens: that a response may consist of, the first of the vocabulary; None for all.
    """

    def read(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
        logprobs, _ = token_logprobs(
            hidden, head, micro_batch.targets, temperature, num_tokens=num_tokens, chunk_tokens=_LOGIT_ROWS
        )
        return logprobs

    return Reading(_token_rows, read, _as_it_is)


def _token_rows(sequence: TokenSequence) -> range:
    return range(len(sequence.prompt_ids) - 1, len(sequence) - 1)


def _value_rows(sequence: TokenSequence) -> range:
    return range(len(sequence.prompt_ids) - 1, len(sequence))


def _last_row(sequence: TokenSequence) -> range:
    return range(len(sequence) - 1, len(sequence))


def _every_row(sequence: TokenSequence) -> range:
    return range(len(sequence))


def _one_output(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
    outputs: Tensor = head(hidden).float()
    if outputs.shape[-1] != 1:
        raise ValueError(
            f"a model gives {outputs.shape[-1]} scores per token where one is needed: load it with num_labels=1"
        )
    return outputs.squeeze(-1)


def _hidden(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> Tensor:
    return hidden.float()


def _as_it_is(of_one: NDArray[np.float32]) -> NDArray[np.float32]:
    return of_one


def _only(of_one: NDArray[np.float32]) -> float:
    return float(of_one[0])


def _mean(of_one: NDArray[np.float32]) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = of_one.mean(axis=0)
    return mean


VALUES = Reading(_value_rows, _one_output, _as_it_is)
"""Before each response token and after the last: [response tokens + 1], by a head of one output.

The value at response index t is the head on the hidden state of the token before it."""
SCORE = Reading(_last_row, _one_output, _only)
"""A head of one output at the last token of prompt and response."""
MEAN_HIDDEN = Reading(_every_row, _hidden, _mean)
"""The mean of the last hidden states, as heads see them, over all tokens of prompt and response: [hidden]."""
