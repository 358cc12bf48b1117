"""Where all samples of a rollout are, as columns: what a policy sees of it, simulated or live, is read off them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.migration import EndedSamples, EngineLimits, LiveSamples, RolloutState

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Phase(IntEnum):
    """Where a sample is; phases up to TRAVELLING are live, and those up to RUNNING can be moved."""

    WAITING = 0
    RUNNING = 1
    LEAVING = 2  # on the engine that it has been told to leave, until the next boundary
    TRAVELLING = 3
    FINISHED = 4
    INFERRING = 5
    SCORED = 6


@dataclass(slots=True, eq=False)
class SampleColumns:
    """Of every sample, [samples] each.

    prompts: numbers, equal for siblings. homes: the device where it is, or is going to. phases: as of `Phase`.
    response_tokens: generated. scored_tokens: of these, those that count, once it is finished. started: as of
        `LiveSamples`.
    """

    prompts: Ints
    prompt_tokens: Ints
    homes: Ints
    phases: NDArray[np.int8]
    response_tokens: Ints
    scored_tokens: Ints
    started: Bools

    @property
    def num_live(self) -> int:
        return int(np.count_nonzero(self.phases <= Phase.TRAVELLING))

    def num_in(self, phase: Phase) -> int:
        """Samples in it."""
        return int(np.count_nonzero(self.phases == phase))

    def tokens(self, samples: Sequence[int]) -> int:
        """What there is to score of finished ones, prompts with it."""
        chosen = list(samples)
        return int(self.prompt_tokens[chosen].sum() + self.scored_tokens[chosen].sum())

    def state(
        self,
        limits: EngineLimits,
        *,
        released: Sequence[bool] | Bools,
        inferring_tokens: Sequence[int] | Ints,
        inferring_left: Sequence[float],
        lost: Sequence[bool] | Bools,
    ) -> RolloutState:
        """What a policy sees; arguments by device, as of `RolloutState`."""
        live = np.flatnonzero(self.phases <= Phase.TRAVELLING)
        ended = np.flatnonzero(self.phases >= Phase.FINISHED)
        backlog = np.flatnonzero(self.phases == Phase.FINISHED)
        return RolloutState(
            limits=limits,
            live=LiveSamples(
                ids=live,
                devices=self.homes[live],
                prompt_tokens=self.prompt_tokens[live],
                response_tokens=self.response_tokens[live],
                started=self.started[live],
                movable=self.phases[live] <= Phase.RUNNING,
                prompts=self.prompts[live],
            ),
            ended=EndedSamples(self.prompts[ended], self.response_tokens[ended]),
            finished_ids=backlog,
            finished_tokens=self.prompt_tokens[backlog] + self.scored_tokens[backlog],
            released=np.array(released, dtype=np.bool_),
            inferring_tokens=np.array(inferring_tokens, dtype=np.int64),
            inferring_left=np.array(inferring_left, dtype=np.float64),
            lost=np.array(lost, dtype=np.bool_),
        )
