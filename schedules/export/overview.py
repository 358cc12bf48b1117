"""A schedule from afar: where operations are too narrow to see, what each rank does in equal slices of time.

A slice is a column as high as its lane. What runs in it is stacked from below, each model's kind as high as its share
of the slice; what is left at the top is idle.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from schedules.export.chart import Bar, Chart
from schedules.export.palette import KIND_NAMES
from schedules.ir import Kind

LEAST_WIDTH = 6.0
"""Operations whose median is narrower, in points or pixels, are drawn as slices."""
_SLICE_WIDTH = 8.0


@dataclass(frozen=True, slots=True)
class Block:
    """What runs in a slice of a lane: x in ticks, `share` of the slice."""

    rank: int
    pipeline: int
    kind: Kind
    only_planned: bool
    start: float
    end: float
    top: float
    bottom: float
    share: float


def is_crowded(drawn: Chart, width: float) -> bool:
    """Whether at this width of the whole chart most operations are too narrow to be drawn each for itself."""
    ticks = [bar.end - bar.start for bar in drawn.bars]
    return bool(ticks) and median(ticks) * width / max(1, drawn.makespan) < LEAST_WIDTH


def blocks(drawn: Chart, width: float) -> tuple[Block, ...]:
    """The chart in slices, at this width of the whole."""
    slice_ticks = max(1, drawn.makespan) * _SLICE_WIDTH / width
    order = list(KIND_NAMES)
    ticks: defaultdict[tuple[int, bool, float, float, int], dict[tuple[int, int], float]] = defaultdict(dict)
    for only_planned, bar in drawn.every_bar():
        key = bar.op.pipeline, order.index(bar.op.kind)
        for index, spent in _by_slice(bar, slice_ticks):
            of_slice = ticks[bar.rank, only_planned, bar.top, bar.bottom, index]
            of_slice[key] = of_slice.get(key, 0.0) + spent
    found = []
    for (rank, only_planned, top, bottom, index), spent_on in ticks.items():
        start, end = slice_ticks * index, min(float(drawn.makespan), slice_ticks * (index + 1))
        level = bottom
        for (pipeline, kind), spent in sorted(spent_on.items()):
            share = min(1.0, spent / (end - start))
            upper = max(top, level - (bottom - top) * share)
            found.append(Block(rank, pipeline, order[kind], only_planned, start, end, upper, level, share))
            level = upper
    return tuple(found)


def _by_slice(bar: Bar, slice_ticks: float) -> list[tuple[int, float]]:
    """Slices that the bar touches, and its ticks in each."""
    first = int(bar.start // slice_ticks)
    last = max(first, math.ceil(bar.end / slice_ticks) - 1)
    edges = [float(bar.start), *(slice_ticks * index for index in range(first + 1, last + 1)), float(bar.end)]
    spent = [(first + number, end - start) for number, (start, end) in enumerate(pairwise(edges))]
    return [(index, ticks) for index, ticks in spent if ticks > 0]
