"""A Gantt chart in plain characters."""

from __future__ import annotations

import textwrap
from bisect import bisect_right
from string import ascii_uppercase

from schedules.ir import Kind, Op, Schedule
from schedules.timing import Timing, evaluate

MARGIN = 13
"""Columns of a line beside the chart's."""
_LEAST_LEGEND = 80


def gantt(schedule: Schedule, width: int = 100) -> str:
    """One line per rank over the makespan, and a legend; `rank_lines` says what a column shows.

    Raises:
        ValueError: the schedule has no times, or more pipelines than letters.
    """
    return f"{rank_lines(schedule, width)}\n{legend(schedule, max(_LEAST_LEGEND, width + MARGIN))}"


def rank_lines(schedule: Schedule, width: int = 100, *, timing: Timing | None = None, end: int | None = None) -> str:
    """One line per rank.

    A column shows what runs in its middle: pipeline A's forwards as A, its backwards (whole, or input gradients) as a,
    weight gradients of any pipeline as ~, idle time as a dot. `width` is the number of columns, at least one per tick
    if there are fewer ticks. `timing`: when operations ran (default: as early as the order allows). `end`: the tick at
    the right edge (default: the makespan), for charts to compare.

    Raises:
        ValueError: the schedule has no times, or more pipelines than letters.
    """
    pipelines = schedule.problem.pipelines
    if len(pipelines) > len(ascii_uppercase):
        raise ValueError(f"{len(pipelines)} pipelines; the chart has letters for {len(ascii_uppercase)}")
    timing = timing or evaluate(schedule)
    end = end or timing.makespan
    num_columns = max(1, min(width, end))
    lines = []
    for rank, order in enumerate(schedule.ranks):
        row = []
        for column in range(num_columns):
            middle = (2 * column + 1) * end / (2 * num_columns)
            index = bisect_right(timing.start[rank], middle) - 1
            running = index >= 0 and timing.end[rank][index] > middle
            row.append(_letter(order[index]) if running else ".")
        lines.append(f"{rank:>4} {''.join(row)} {1 - timing.bubble_ratios[rank]:6.1%}")
    return "\n".join(lines)


def legend(schedule: Schedule, width: int) -> str:
    """What the letters mean, in lines of at most `width`."""
    pipelines = zip(ascii_uppercase, schedule.problem.pipelines, strict=False)
    names = ", ".join(f"{letter} {pipeline.name}" for letter, pipeline in pipelines)
    weight = ", ~ weight gradient" if any(op.kind is Kind.W for _, op in schedule.ops()) else ""
    text = f"{names} (forward; backward in lower case){weight}, . idle; at the right, share of time busy"
    indent = " " * 5
    return "\n".join(textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent))


def _letter(op: Op) -> str:
    if op.kind is Kind.W:
        return "~"
    letter = ascii_uppercase[op.pipeline]
    return letter if op.kind is Kind.F else letter.lower()
