"""The evaluator: start and end of every operation, makespan, bubbles and peak memory, all derived from the order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

    end_of: dict[Op, int] = {}
    start: list[list[int]] = [[] for _ in schedule.ranks]
    end: list[list[int]] = [[] for _ in schedule.ranks]
    known = {op for _, op in schedule.ops()}
    for rank, index in result.steps:
        op = schedule.ranks[rank][index]
        earliest = end[rank][-1] if index else 0
        for needed in needs(known, op, problem):
            earliest = max(earliest, end_of[needed] + transfer_ticks(needed, op))
        start[rank].append(earliest)
        end[rank].append(earliest + ticks(op))
        end_of.setdefault(op, end[rank][-1])
    return Timing(
        start=tuple(map(tuple, start)),
        end=tuple(map(tuple, end)),
        makespan=max((times[-1] for times in end if times), default=0),
        busy_ticks=tuple(sum(map(ticks, order)) for order in schedule.ranks),
        peak_bytes=tuple(max(levels) for levels in memory_levels(schedule)),
    )


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
