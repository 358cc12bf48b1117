"""Generation workers whose engines wait in the middle of their samples: what must come before these end does."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import ray

from fuse.workers.generation_worker import Departure, GenerationWorker

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # worker processes cannot import tests


class HoldingWorker(GenerationWorker):
    """Takes so many steps with its samples, and then executes commands alone until it is let go."""

    most_steps: float = math.inf
    num_steps = 0

    def hold(self, num_steps: int) -> None:
        self.most_steps = self.num_steps + num_steps

    def let_go(self) -> None:
        self.most_steps = math.inf

    def _execute_commands(self) -> None:
        super()._execute_commands()
        while self._num_live and not self._closing and self.num_steps >= self.most_steps:
            if self._commands.empty():
                time.sleep(1e-3)
            else:
                super()._execute_commands()
        self.num_steps += 1


class HeldUntilOthersCome(HoldingWorker):
    """Is let go when samples of its own leave, or those of another engine come."""

    most_steps = 40

    def evict(self, sample_ids: Sequence[int], with_kv: bool = False) -> list[Departure]:
        departures = super().evict(sample_ids, with_kv)
        self.let_go()
        return departures

    def admit(self, departures: Sequence[Departure]) -> None:
        super().admit(departures)
        self.let_go()
