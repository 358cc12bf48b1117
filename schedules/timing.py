"""The evaluator: start and end of every operation, makespan, bubbles and peak memory, all derived from the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from schedules.ir import Op, Schedule
from schedules.walk import describe_cycle, needs, wait_cycle, walk


@dataclass(frozen=True, slots=True)
class Timing:
    """When a schedule's operations run if each starts as early as its order allows.

    `start` and `end` (ticks) have the shape of `schedule.ranks`. `busy_ticks` and `peak_bytes` have one entry per rank;
    peaks include the rank's initial bytes.
    """

    start: tuple[tuple[int, ...], ...]
    end: tuple[tuple[int, ...], ...]
    makespan: int
    busy_ticks: tuple[int, ...]
    peak_bytes: tuple[int, ...]

    @property
    def bubble_ratios(self) -> tuple[float, ...]:
        """Idle share of each rank over the makespan; a schedule without operations has none."""
        return tuple((self.makespan - busy) / self.makespan if self.makespan else 0.0 for busy in self.busy_ticks)

    @property
    def bubble_ratio(self) -> float:
        """Idle share of all ranks together."""
        total = self.makespan * len(self.busy_ticks)
        return (total - sum(self.busy_ticks)) / total if total else 0.0


def evaluate(
    schedule: Schedule,
    ticks: Callable[[Op], int] | None = None,
    transfer_ticks: Callable[[Op, Op], int] | None = None,
) -> Timing:
    """Time a schedule: an operation starts when its rank is free and what it needs has ended and been transferred.

    ticks: durations of single operations in place of the problem's, for micro-batches that differ in length.
    transfer_ticks: as of the problem, of single messages.

    O(operations). Completeness, placement and limits are the validator's business; only what has no times is refused.

    Raises:
        ValueError: an operation is not of the problem, needs one that is absent, or waits for itself through others.
    """
    problem = schedule.problem
    ticks, transfer_ticks = ticks or problem.ticks, transfer_ticks or problem.transfer_ticks
    steps = _steps_of(schedule)
    ends: list[int] = []
    start: list[list[int]] = [[] for _ in schedule.ranks]
    end: list[list[int]] = [[] for _ in schedule.ranks]
    busy = [0] * len(schedule.ranks)
    for rank, op, needed in steps:
        earliest = end[rank][-1] if end[rank] else 0
        for position in needed:
            ready = ends[position] + transfer_ticks(steps[position][1], op)
            if ready > earliest:
                earliest = ready
        duration = ticks(op)
        start[rank].append(earliest)
        end[rank].append(earliest + duration)
        ends.append(earliest + duration)
        busy[rank] += duration
    return Timing(
        start=tuple(map(tuple, start)),
        end=tuple(map(tuple, end)),
        makespan=max((times[-1] for times in end if times), default=0),
        busy_ticks=tuple(busy),
        peak_bytes=tuple(max(levels) for levels in memory_levels(schedule)),
    )


_Step = tuple[int, Op, tuple[int, ...]]
"""A rank, its next operation, and where among the steps what that needs stands."""

_MOST_KEPT_OPS = 1 << 17
"""Of a schedule whose steps are kept: an update times one or two again and again, with other durations."""


def _steps_of(schedule: Schedule) -> Sequence[_Step]:
    """All operations, each after what it needs. Raises: ValueError, as of `evaluate`."""
    is_small = sum(map(len, schedule.ranks)) <= _MOST_KEPT_OPS
    return _kept_steps(schedule) if is_small else _steps(schedule)


def _steps(schedule: Schedule) -> list[_Step]:
    problem = schedule.problem
    for rank, op in schedule.ops():
        if not problem.contains(op):
            raise ValueError(f"rank {rank}: {op} is not an operation of this problem; run schedules.violations for all")
    result = walk(schedule)
    if result.blocked:
        cycle = wait_cycle(schedule, result.blocked)
        if cycle:
            raise ValueError(f"schedule deadlocks: {describe_cycle(cycle)}; reorder these ranks")
        absent = result.blocked[0]
        raise ValueError(f"rank {absent.rank}: {absent.op} needs {absent.needed}, which is absent; add it")

    positions: dict[Op, int] = {}
    known = {op for _, op in schedule.ops()}
    steps: list[_Step] = []
    for position, (rank, index) in enumerate(result.steps):
        op = schedule.ranks[rank][index]
        steps.append((rank, op, tuple(map(positions.__getitem__, needs(known, op, problem)))))
        positions.setdefault(op, position)
    return steps


_kept_steps = lru_cache(maxsize=4)(_steps)


def memory_levels(schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """Bytes on each rank before its first operation and after the start of each; a function of the order alone."""
    levels = []
    for initial, order in zip(schedule.problem.initial_bytes, schedule.ranks, strict=True):
        level = initial
        profile = [level]
        for op in order:
            level += schedule.problem.bytes_taken(op)
            profile.append(level)
        levels.append(tuple(profile))
    return tuple(levels)
