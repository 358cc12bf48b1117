"""Native evaluations and local search steps of one schedule, as many as asked for.

`fuse bench kernels` times them, and has callgrind count the instructions of
`python -m fuse.benchmarks.schedule_calls RANKS MICRO_BATCHES EVALUATIONS STEPS`, which loads no torch.
"""

from __future__ import annotations

import sys

import numpy as np

from schedules import _native
from schedules.fused.compiled import compile_problem
from schedules.fused.greedy import greedy
from schedules.instances import Instance, actor_and_critic


def large_actor(num_ranks: int, num_micro_batches: int) -> Instance:
    """An actor twice as large as its critic, both on all ranks: 4 x ranks x micro-batches operations."""
    return actor_and_critic(
        actor_stages=num_ranks,
        critic_stages=num_ranks,
        actor_microbatches=num_micro_batches,
        critic_microbatches=num_micro_batches,
        actor_forward=2,
        critic_forward=1,
        actor_activation=1.64,
        critic_activation=1,
    )


class ScheduleCalls:
    """The greedy schedule of `large_actor`."""

    def __init__(self, num_ranks: int, num_micro_batches: int) -> None:
        instance = large_actor(num_ranks, num_micro_batches)
        self.schedule = greedy(instance.problem)
        self._compiled = compile_problem(instance.problem, split=False)
        self._orders = self._compiled.orders(self.schedule)
        self._start = np.zeros(len(self._compiled.ops), np.int32)
        self._peak_bytes = np.zeros(num_ranks, np.int64)

    @property
    def num_ops(self) -> int:
        return len(self._compiled.ops)

    def evaluate(self, num_evaluations: int) -> None:
        """Compute makespan, starts and peaks from nothing, again and again."""
        for _ in range(num_evaluations):
            _native.evaluate(self._compiled.graph, *self._orders, self._start, self._peak_bytes)

    def search(self, num_steps: int) -> None:
        """Anneal within the schedule's own peaks, from the first temperature to the last, towards what cannot be."""
        self.evaluate(1)
        options = _native.AnnealingOptions()
        annealing = _native.Annealing(
            self._compiled.graph, *self._orders, self._peak_bytes, 1, max(num_steps, 1), 0, options
        )
        annealing.advance(num_steps)


def main(num_ranks: int, num_micro_batches: int, num_evaluations: int, num_steps: int) -> None:
    """Both, the search even of no steps: what it takes to start is then the same in every run."""
    calls = ScheduleCalls(num_ranks, num_micro_batches)
    calls.evaluate(num_evaluations)
    calls.search(num_steps)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
