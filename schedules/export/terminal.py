"""A Gantt chart in plain characters."""

from __future__ import annotations

from bisect import bisect_right
from string import ascii_uppercase

from schedules.ir import Kind, Op, Schedule
from schedules.timing import evaluate


def gantt(schedule: Schedule, width: int = 100) -> str:
    """One line per rank over the makespan, and a legend.

    A column shows what runs in its middle: pipeline A's forwards as A, its backwards (whole, or input gradients) as a,
    weight gradients of any pipeline as ~, idle time as a dot. `width` is the number of columns, at least one per tick
    if there are fewer ticks.

    Raises:
        ValueError: the schedule has no times, or more pipelines than letters.
    """
    pipelines = schedule.problem.pipelines
    if len(pipelines) > len(ascii_uppercase):
        raise ValueError(f"{len(pipelines)} pipelines; the chart has letters for {len(ascii_uppercase)}")
    timing = evaluate(schedule)
    num_columns = max(1, min(width, timing.makespan))
    lines = []
    for rank, order in enumerate(schedule.ranks):
        row = []
        for column in range(num_columns):
            middle = (2 * column + 1) * timing.makespan / (2 * num_columns)
            index = bisect_right(timing.start[rank], middle) - 1
            running = index >= 0 and timing.end[rank][index] > middle
            row.append(_letter(order[index]) if running else ".")
        lines.append(f"{rank:>4} {''.join(row)} {1 - timing.bubble_ratios[rank]:6.1%}")
    names = ", ".join(f"{ascii_uppercase[number]} {pipeline.name}" for number, pipeline in enumerate(pipelines))
    weight = ", ~ weight gradient" if any(op.kind is Kind.W for _, op in schedule.ops()) else ""
    legend = f"     {names} (forward; backward in lower case){weight}, . idle; at the right, share of time busy"
    return "\n".join([*lines, legend])


def _letter(op: Op) -> str:
    if op.kind is Kind.W:
        return "~"
    letter = ascii_uppercase[op.pipeline]
    return letter if op.kind is Kind.F else letter.lower()
