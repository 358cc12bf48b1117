"""A schedule as Chrome trace-event JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process, a thread per rank, a complete event ("X") per operation, an arrow ("s" to "f") from each operation to those
on other ranks that need its result, and a counter ("C") per rank with its memory.

Source: Trace Event Format, complete, flow, counter and metadata events. An arrow's end belongs to the event that
encloses it on its thread; both lie in the middle of their operations, where no other event can enclose them.
"""

from __future__ import annotations

from collections.abc import Iterator

from schedules.export.palette import KIND_NAMES
from schedules.ir import Op, Schedule
from schedules.timing import Timing, evaluate, memory_levels
from schedules.walk import needs

_PROCESS = 0
MICROSECONDS_PER_TICK = 1000.0


def trace_events(
    schedule: Schedule, *, timing: Timing | None = None, microseconds_per_tick: float = MICROSECONDS_PER_TICK
) -> dict[str, object]:
    """The schedule as a JSON object, which `json.dumps` writes.

    timing: when operations ran (default: as early as the order allows). The format's times are microseconds; a tick is
    shown as a millisecond unless told otherwise.

    Raises:
        ValueError: the schedule has no times.
    """
    timing = timing or evaluate(schedule)
    times = {
        op: (start * microseconds_per_tick, end * microseconds_per_tick)
        for order, starts, ends in zip(schedule.ranks, timing.start, timing.end, strict=True)
        for op, start, end in zip(order, starts, ends, strict=True)
    }
    events = [*_names(schedule), *_operations(schedule, times), *_arrows(schedule, times), *_memory(schedule, times)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(schedule: Schedule) -> Iterator[dict[str, object]]:
    yield {"ph": "M", "name": "process_name", "pid": _PROCESS, "args": {"name": "schedule"}}
    for rank in range(schedule.problem.num_ranks):
        where = {"ph": "M", "pid": _PROCESS, "tid": rank}
        yield {**where, "name": "thread_name", "args": {"name": f"rank {rank}"}}
        yield {**where, "name": "thread_sort_index", "args": {"sort_index": rank}}


def _operations(schedule: Schedule, times: dict[Op, tuple[float, float]]) -> Iterator[dict[str, object]]:
    for rank, op in schedule.ops():
        start, end = times[op]
        pipeline = schedule.problem.pipelines[op.pipeline].name
        yield {
            "ph": "X",
            "name": f"{op.kind} {pipeline}.{op.stage}.{op.micro_batch}",
            "cat": f"{pipeline},{KIND_NAMES[op.kind]}",
            "pid": _PROCESS,
            "tid": rank,
            "ts": start,
            "dur": end - start,
            "args": {"stage": op.stage, "micro_batch": op.micro_batch},
        }


def _arrows(schedule: Schedule, times: dict[Op, tuple[float, float]]) -> Iterator[dict[str, object]]:
    problem = schedule.problem
    number = 0
    for rank, op in schedule.ops():
        for needed in needs(times, op, problem):
            if problem.rank_of(needed) == rank:
                continue
            arrow = {"name": "result", "cat": "result", "id": number, "pid": _PROCESS}
            yield {**arrow, "ph": "s", "tid": problem.rank_of(needed), "ts": sum(times[needed]) / 2}
            yield {**arrow, "ph": "f", "bp": "e", "tid": rank, "ts": sum(times[op]) / 2}
            number += 1


def _memory(schedule: Schedule, times: dict[Op, tuple[float, float]]) -> Iterator[dict[str, object]]:
    levels = memory_levels(schedule)
    if not any(map(any, levels)):
        return
    for rank, order in enumerate(schedule.ranks):
        starts = [0.0, *(times[op][0] for op in order)]
        for start, level in zip(starts, levels[rank], strict=True):
            counter = {"ph": "C", "name": f"memory of rank {rank}", "pid": _PROCESS, "ts": start}
            yield {**counter, "args": {"bytes": level}}
