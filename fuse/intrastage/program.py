"""A schedule as ranks run it: made once, by who plans, of which each rank unpacks its own part, and that once.

Every rank's part follows from all ranks' operations, of which there are thousands, and an update after the other is
trained by the same ones.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import lru_cache

import schedules
from fuse.intrastage.message_order import Action, Step, steps_of
from schedules import Problem, Schedule

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Program:
    """What every rank does of a legal schedule; see `program_of`. packed: by rank, its steps."""

    problem: Problem
    packed: tuple[bytes, ...]

    def steps(self, rank: int) -> tuple[Step, ...]:
        """A rank's; of the same bytes the same ones."""
        return _unpacked(self.packed[rank])

    def schedule(self) -> Schedule:
        """What this is the program of. O(n) in all ranks' operations."""
        of_ranks = map(self.steps, range(self.problem.num_ranks))
        computed = (tuple(step.op for step in own if step.action is Action.COMPUTE) for own in of_ranks)
        return Schedule(self.problem, tuple(computed))


@lru_cache(maxsize=_REMEMBERED)
def program_of(schedule: Schedule) -> Program:
    """What ranks run; at once for a schedule that was asked for before.

    Raises:
        ValueError: the schedule is illegal.
    """
    schedules.check(schedule)
    return Program(schedule.problem, tuple(map(pickle.dumps, steps_of(schedule))))


@lru_cache(maxsize=_REMEMBERED)
def _unpacked(steps: bytes) -> tuple[Step, ...]:
    found: tuple[Step, ...] = pickle.loads(steps)  # noqa: S301  (of this run)
    return found
