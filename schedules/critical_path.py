"""Why a schedule takes as long as it does: the chain of operations without a gap that ends last."""

from __future__ import annotations

from schedules.ir import Op, Schedule
from schedules.timing import Timing, evaluate
from schedules.walk import needs


def critical_path(schedule: Schedule, timing: Timing | None = None) -> tuple[Op, ...]:
    """The operations that the makespan consists of, first to last; between two of them lies at most a transfer.

    From the operation that ends last it goes back, each time to what the operation had to wait for longest: the one
    before it on its rank, or one whose result it needs. Of equals it stays on the rank. Shortening an operation that is
    not on a critical path does not shorten the schedule; a schedule may have several such paths, of which this is one.

    timing: when the operations ran; by default, as early as they could. In recorded times, operations of the path may
        have gaps between them: something that the schedule does not know of held them up.

    O(operations).

    Raises:
        ValueError: no timing is given and the schedule has none.
    """
    timing = timing or evaluate(schedule)
    problem = schedule.problem
    ops = {op for _, op in schedule.ops()}
    end_of: dict[Op, int] = {}
    before: dict[Op, Op] = {}
    for order, ends in zip(schedule.ranks, timing.end, strict=True):
        for index, (op, end) in enumerate(zip(order, ends, strict=True)):
            end_of[op] = end
            if index:
                before[op] = order[index - 1]
    if not end_of:
        return ()
    path = [max(end_of, key=lambda op: (end_of[op], op))]
    while True:
        op = path[-1]
        arrivals = [
            (end_of[needed] + problem.transfer_ticks(needed, op), False, needed) for needed in needs(ops, op, problem)
        ]
        if op in before:
            arrivals.append((end_of[before[op]], True, before[op]))
        if not arrivals:
            return tuple(reversed(path))
        path.append(max(arrivals)[2])
