"""What a drawing of a schedule shows and where, whichever library draws it.

Rank r has the band from y = r to r + 1, downwards: its operations above, its memory below them. With recorded times
the operations have two lanes: as planned, and under it as executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from schedules.critical_path import critical_path
from schedules.export.palette import KIND_NAMES
from schedules.ir import Op, Problem, Schedule
from schedules.timing import Timing, evaluate, memory_levels

_BARS_TOP, _BARS_END = 0.08, 0.92
_BARS_END_OVER_MEMORY, _MEMORY_TOP, _MEMORY_END = 0.60, 0.66, 0.94
_LANE_GAP = 0.03
_SIX_FIGURES = 1e5
_LEAST_BYTES = 1_000_000
_BYTE_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_PATH_INSET = 0.02
_BARS_WITH_FULL_EDGES = 60  # per rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Units for the reader: a tick is `time_per_tick` of the unit `time`, a byte `memory_per_byte` of `memory`.

    Without a unit of memory, numbers as large as real activations are taken for bytes, smaller ones for units of some
    kind.
    """

    time_per_tick: float = 1.0
    time: str = "ticks"
    memory_per_byte: float = 1.0
    memory: str = ""

    def time_text(self, ticks: float) -> str:
        return f"{number_text(self.time_per_tick * ticks)} {self.time}"

    def memory_text(self, num_bytes: float) -> str:
        if not self.memory and num_bytes >= _LEAST_BYTES:
            return bytes_text(num_bytes)
        return f"{number_text(self.memory_per_byte * num_bytes)} {self.memory}".rstrip()


def number_text(value: float) -> str:
    """A number in digits, never with an exponent: six figures of it, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= _SIX_FIGURES else f"{value:,.6g}"


def bytes_text(num_bytes: float) -> str:
    """Bytes in their decimal unit, to three figures."""
    unit = max((name for name in _BYTE_UNITS if num_bytes >= _BYTE_UNITS[name]), key=_BYTE_UNITS.__getitem__)
    value = num_bytes / _BYTE_UNITS[unit]
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


TICKS = Units()
MICROSECONDS = Units(time_per_tick=1e-3, time="ms")


@dataclass(frozen=True, slots=True)
class Bar:
    """One operation in one lane: y from `top` to `bottom`, x in ticks; `level`: the rank's bytes from its start on."""

    op: Op
    rank: int
    start: int
    end: int
    top: float
    bottom: float
    level: int
    is_critical: bool

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2

    @property
    def path_height(self) -> float:
        """Where the critical path passes: along the lower edge, clear of the label."""
        return self.bottom - _PATH_INSET

    @property
    def label(self) -> str:
        """What is written into the bar: the micro-batch."""
        return str(self.op.micro_batch)


@dataclass(frozen=True, slots=True)
class MemoryCurve:
    """A rank's memory as steps: from `ticks[i]` on, `levels[i]` bytes, drawn at `heights[i]`; `floor` is zero bytes."""

    rank: int
    ticks: tuple[int, ...]
    levels: tuple[int, ...]
    heights: tuple[float, ...]
    floor: float
    limit: int | None
    limit_height: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Everything to draw. `lanes`: (middle, name) of each. `planned`: bars of the plan, beside executed `bars`."""

    problem: Problem
    units: Units
    bars: tuple[Bar, ...]
    planned: tuple[Bar, ...]
    memory: tuple[MemoryCurve, ...]
    path: tuple[Bar, ...]
    lanes: tuple[tuple[float, str], ...]
    makespan: int
    summary: str

    def every_bar(self) -> Iterator[tuple[bool, Bar]]:
        """Every (whether it was only planned, bar)."""
        yield from ((True, bar) for bar in self.planned)
        yield from ((False, bar) for bar in self.bars)

    @property
    def edge(self) -> float:
        """Width of the line between neighbouring bars, relative to that of a chart with few: it must not cover them."""
        per_rank = len(self.bars) / self.problem.num_ranks
        return min(1.0, max(0.2, _BARS_WITH_FULL_EDGES / per_rank)) if self.bars else 1.0

    def describe(self, bar: Bar) -> tuple[str, ...]:
        """The bar in words, a line each."""
        pipeline = self.problem.pipelines[bar.op.pipeline]
        lines = [
            f"{bar.op.kind} {pipeline.name}.{bar.op.stage}.{bar.op.micro_batch}",
            f"{KIND_NAMES[bar.op.kind]} of {pipeline.name}, stage {bar.op.stage}, micro-batch {bar.op.micro_batch}",
            f"rank {bar.rank}, {self._time(bar.start)} to {self._time(bar.end)} ({self._time(bar.end - bar.start)})",
        ]
        if self.memory:
            lines.append(f"memory of the rank from then on: {self.units.memory_text(bar.level)}")
        if bar.is_critical:
            lines.append("on the critical path")
        return tuple(lines)

    def _time(self, ticks: int) -> str:
        return self.units.time_text(ticks)


def chart(
    schedule: Schedule, *, executed: Timing | None = None, planned: Timing | None = None, units: Units = TICKS
) -> Chart:
    """Lay a schedule out as planned, as executed, or both, one over the other.

    executed: when operations ran, in ticks. planned: when they should have (default without `executed`: as early as the
    order allows).

    Raises:
        ValueError: the schedule has no times.
    """
    shown = executed or planned or evaluate(schedule)
    problem = schedule.problem
    levels = memory_levels(schedule)
    has_memory = any(map(any, levels))
    bars_end = _BARS_END_OVER_MEMORY if has_memory else _BARS_END
    middle = (_BARS_TOP + bars_end) / 2
    on_path = critical_path(schedule, shown)

    def bars(timing: Timing, top: float, bottom: float, path: frozenset[Op]) -> tuple[Bar, ...]:
        return tuple(
            Bar(op, rank, start, end, rank + top, rank + bottom, levels[rank][index + 1], op in path)
            for rank, order in enumerate(schedule.ranks)
            for index, (op, start, end) in enumerate(zip(order, timing.start[rank], timing.end[rank], strict=True))
        )

    if executed is None or planned is None:
        shown_bars = bars(shown, _BARS_TOP, bars_end, frozenset(on_path))
        planned_bars: tuple[Bar, ...] = ()
        lanes = tuple((rank + middle, f"rank {rank}") for rank in range(problem.num_ranks))
    else:
        shown_bars = bars(executed, middle + _LANE_GAP / 2, bars_end, frozenset(on_path))
        planned_bars = bars(planned, _BARS_TOP, middle - _LANE_GAP / 2, frozenset(critical_path(schedule, planned)))
        quarter = (bars_end - _BARS_TOP) / 4
        lanes = tuple(
            (rank + middle + side * quarter, f"rank {rank} {name}" if side < 0 else name)
            for rank in range(problem.num_ranks)
            for side, name in ((-1, "planned"), (1, "executed"))
        )
    bar_of = {bar.op: bar for bar in shown_bars}
    return Chart(
        problem=problem,
        units=units,
        bars=shown_bars,
        planned=planned_bars,
        memory=_memory_curves(schedule, shown, levels) if has_memory else (),
        path=tuple(bar_of[op] for op in on_path),
        lanes=lanes,
        makespan=max(shown.makespan, planned.makespan if planned else 0),
        summary=_summary(shown, planned, executed, units, has_memory),
    )


def _memory_curves(schedule: Schedule, timing: Timing, levels: tuple[tuple[int, ...], ...]) -> tuple[MemoryCurve, ...]:
    """All to one scale: the highest limit or peak."""
    limits = schedule.problem.memory_limit_bytes
    highest = max(max(timing.peak_bytes), max(limits, default=0) if limits else 0)

    def height(rank: int, num_bytes: int) -> float:
        return rank + _MEMORY_END - (_MEMORY_END - _MEMORY_TOP) * num_bytes / highest

    return tuple(
        MemoryCurve(
            rank=rank,
            ticks=(0, *timing.start[rank], timing.makespan),
            levels=(*of_rank, of_rank[-1]),
            heights=tuple(height(rank, level) for level in (*of_rank, of_rank[-1])),
            floor=rank + _MEMORY_END,
            limit=limits[rank] if limits else None,
            limit_height=height(rank, limits[rank]) if limits else None,
        )
        for rank, of_rank in enumerate(levels)
    )


def _summary(shown: Timing, planned: Timing | None, executed: Timing | None, units: Units, has_memory: bool) -> str:
    if executed is not None:
        timings = {"planned": planned, "executed": executed}
        return "; ".join(
            f"{name} {units.time_text(timing.makespan)}, {timing.bubble_ratio:.1%} idle"
            for name, timing in timings.items()
            if timing is not None
        )
    memory = f", peak memory {units.memory_text(max(shown.peak_bytes))}" if has_memory else ""
    return f"makespan {units.time_text(shown.makespan)}, {shown.bubble_ratio:.1%} idle{memory}"
