"""A sample: one prompt's response on its way through an iteration, in exactly one state and one place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray


class SampleState(StrEnum):
    """queued -> generating -> (migrating -> generating)* -> generated -> inferring -> scored."""

    QUEUED = "queued"
    GENERATING = "generating"
    MIGRATING = "migrating"
    GENERATED = "generated"
    INFERRING = "inferring"
    SCORED = "scored"


_NEXT_STATES: Mapping[SampleState, frozenset[SampleState]] = {
    SampleState.QUEUED: frozenset({SampleState.GENERATING}),
    SampleState.GENERATING: frozenset({SampleState.MIGRATING, SampleState.GENERATED}),
    SampleState.MIGRATING: frozenset({SampleState.GENERATING}),
    SampleState.GENERATED: frozenset({SampleState.INFERRING}),
    SampleState.INFERRING: frozenset({SampleState.SCORED}),
    SampleState.SCORED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that answer one prompt. number: the same for all of them, another in every group. size: how many."""

    number: int
    size: int


@dataclass(slots=True)
class Sample:
    """One prompt, the response generated for it and what inference says of it.

    `id` is unique over a whole run and keys the sampling noise, so a sample's tokens never depend on
    which engine, batch or device produced them. `length` is the number of response tokens that count (see
    `response_length`), known once it is generated; a response may hold more. `scores` are those of reward models by
    role, `rewards` those of all models and functions in their order, NaN for none; `score` is what they come to.
    `baseline` is what an algorithm takes off it, where it does.
    `logprobs` are the engine's, `trainer_logprobs` those that the trainer computes by the same weights, where that was
    asked for. `rewarded_ids` are prompt and response as reward models read them whose tokens are not
    the policy's, by role.
    """

    id: int
    prompt_ids: tuple[int, ...]
    columns: Mapping[str, object] = field(default_factory=dict)
    group: Group | None = None
    state: SampleState = SampleState.QUEUED
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    length: int = 0
    reference_logprobs: NDArray[np.float32] | None = None
    trainer_logprobs: NDArray[np.float32] | None = None
    values: NDArray[np.float32] | None = None
    scores: Mapping[str, float] | None = None
    score: float | None = None
    baseline: float | None = None
    rewards: list[float] = field(default_factory=list)
    rewarded_ids: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def old_logprobs(self) -> NDArray[np.float32]:
        """Of the response tokens that count, before the update: the trainer's where it told them, or the engine's."""
        known = self.logprobs if self.trainer_logprobs is None else self.trainer_logprobs
        return np.asarray(known[: self.length], dtype=np.float32)

    def advance(self, state: SampleState) -> None:
        """Move to the next state; a step the life cycle does not have is a bug."""
        assert state in _NEXT_STATES[self.state], f"sample {self.id} cannot go from {self.state} to {state}"
        self.state = state


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens that end responses and fill up batches, and of those that responses consist of.

    eos: end a sequence, for whoever asks whether a response is complete. stop: end a response where it is generated.
    num_tokens: all ids below it; None for the model's whole vocabulary.
    """

    pad: int
    eos: tuple[int, ...]
    stop: tuple[int, ...]
    num_tokens: int | None = None


def length_to_stop(response_ids: Sequence[int], stop_token_ids: Collection[int]) -> int:
    """Number of tokens up to and including the first stop token, all of them without one."""
    stops = (index for index, token in enumerate(response_ids, 1) if token in stop_token_ids)
    return next(stops, len(response_ids))


def response_length(response_ids: Sequence[int], stop_token_ids: Collection[int], pad_token_id: int | None) -> int:
    """Number of tokens that count: up to and including the first stop token, and before the first padding token.

    pad_token_id: None where padding that is sampled counts, too.
    """
    end = length_to_stop(response_ids, stop_token_ids)
    return next((index for index in range(end) if response_ids[index] == pad_token_id), end)
