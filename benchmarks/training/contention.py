"""Times of a schedule on devices that slow one another down: cores share memory's bandwidth, power and caches.

An operation is measured twice: while all ranks compute, and while the others idle. In a schedule it runs at the first
pace while others compute, at the second while they idle, so that a schedule with more bubbles has faster operations.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fuse.intrastage.cost_profile import Profile, Shape
from fuse.intrastage.planned_times import PlannedTimes, planned_times, times_of
from schedules import Op, Schedule

_ROUNDS = 12
"""In which times and overlaps settle."""


def contended_times(
    schedule: Schedule, together: Profile, alone: Profile, names: Sequence[str], shapes: Sequence[Sequence[Shape]]
) -> PlannedTimes:
    """As `planned_times`. together, alone: costs while all ranks compute, and while all others idle."""
    times = planned_times(schedule, together, names, shapes)
    unhindered = planned_times(schedule, alone, names, shapes)
    slow_s, alone_s = _seconds(schedule, times), _seconds(schedule, unhindered)
    fast_s = {op: min(slow_s[op], alone_s[op]) for op in slow_s}
    for _ in range(_ROUNDS):
        overlap_s = _overlaps(schedule, times)
        # What was done in the overlap took slow_s / fast_s times as long: s = fast + overlap (1 - fast / slow).
        seconds = {op: min(slow_s[op], fast_s[op] + overlap_s[op] * (1 - fast_s[op] / slow_s[op])) for op in slow_s}
        times = times_of(schedule, seconds, times.transfer_s)
    return times


def _seconds(schedule: Schedule, times: PlannedTimes) -> dict[Op, float]:
    """What each operation takes."""
    return {
        op: end_s - start_s
        for rank, order in enumerate(schedule.ranks)
        for op, (start_s, end_s) in zip(order, times.of_rank(rank), strict=True)
    }


def _overlaps(schedule: Schedule, times: PlannedTimes) -> Mapping[Op, float]:
    """Seconds of each operation while others compute; of several other ranks, the mean."""
    by_rank = [(np.array(starts), np.array(ends)) for starts, ends in zip(times.start_s, times.end_s, strict=True)]
    overlaps: dict[Op, float] = {}
    for rank, order in enumerate(schedule.ranks):
        start_s, end_s = by_rank[rank]
        total = np.zeros(len(order))
        for other in itertools.chain(by_rank[:rank], by_rank[rank + 1 :]):
            total += _busy_until(*other, end_s) - _busy_until(*other, start_s)
        overlaps |= dict(zip(order, (total / max(1, len(by_rank) - 1)).tolist(), strict=True))
    return overlaps


def _busy_until(
    start_s: NDArray[np.float64], end_s: NDArray[np.float64], at_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Seconds that a rank with these operations, in order, has computed by then."""
    if not len(start_s):
        return np.zeros_like(at_s)
    before = np.concatenate([[0.0], np.cumsum(end_s - start_s)])
    index = np.searchsorted(start_s, at_s, side="right")  # operations begun
    running = np.minimum(at_s, end_s[index - 1]) - start_s[index - 1]
    return np.where(index > 0, before[index - 1] + running, 0.0)
