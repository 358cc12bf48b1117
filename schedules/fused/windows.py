"""A large schedule improved window by window: a slice of time is solved as a constraint program, the rest is fixed.

Sets: W, the operations that start in a window [begin, end) of the schedule. Before the window everything keeps its
start; behind it every rank keeps its order.

Variables: start(x) for x in W; the makespan, or the peak.

Constraints:
  W1  start(x) >= end(p) + transfer(p, x)                      x needs the result of p; constant where p is before W
  W2  start(x) >= when its rank is done with what lies before
  W3  makespan >= end(x) + after(x)                            after: the longest path through what lies behind W
  W4  operations of one chain, and messages of one channel, keep their order
  W5  no two operations of a rank overlap
  W6  on every rank, what is held at entry and not given back in W, and each activation over [start(F_j), start(B_j)),
      each weight gradient's inputs over [start(I_j), start(W_j)), cut at the window's ends, fit together

Objective: the makespan; or the peak, within the window, of those ranks that reach the schedule's peak there. In the
second case the makespan does not grow, and the other ranks stay below the schedule's peak.

Memory counts in the units of `memory_units`.

The schedule itself is the hint, so the result is never worse. Levels outside of W depend on the order there alone.

Source: Shaw, Using constraint programming and local search methods to solve vehicle routing problems, CP 1998 (large
neighbourhood search).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from ortools.sat.python import cp_model

from schedules.fused.cp_solver import make_solver, run
from schedules.fused.memory_units import MOST_BYTE_TICKS, in_memory_units
from schedules.ir import Kind, Op, Schedule
from schedules.timing import Timing, evaluate, memory_levels
from schedules.walk import channel_from, channel_into, needs


@dataclass(frozen=True, slots=True)
class Window:
    """Operations with begin <= start < end (ticks) are free."""

    begin: int
    end: int


@dataclass(slots=True)
class _Frozen:
    """A schedule, its times, and the longest path from the start of each operation to the schedule's end."""

    schedule: Schedule
    timing: Timing
    levels: tuple[tuple[int, ...], ...]
    start: dict[Op, int]
    path: dict[Op, int]
    users: dict[Op, list[Op]]

    def end(self, op: Op) -> int:
        return self.start[op] + self.schedule.problem.ticks(op)


@dataclass(slots=True)
class _Model:
    frozen: _Frozen
    free: list[range]  # per rank: places in its order
    cp: cp_model.CpModel
    start: dict[Op, cp_model.IntVar]
    makespan: cp_model.IntVar


def shorten(
    schedule: Schedule,
    window: Window,
    *,
    time_limit_s: float,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Schedule:
    """The schedule with its window as short as it can be made in the time given, within the ranks' limits."""
    frozen = _freeze(_in_units(schedule))
    model = _build(frozen, window)
    for rank, limit in enumerate(frozen.schedule.problem.memory_limit_bytes or ()):
        _hold_memory(model, rank, limit)
    model.cp.minimize(model.makespan)
    return _solve(model, schedule, time_limit_s, seed, should_stop)


def lower_peak(
    schedule: Schedule,
    window: Window,
    *,
    time_limit_s: float,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Schedule:
    """The schedule, made no longer, with a lower peak on the ranks that reach the schedule's peak in the window."""
    frozen = _freeze(_in_units(schedule))
    model = _build(frozen, window)
    model.cp.add(model.makespan <= frozen.timing.makespan)
    overall = max(frozen.timing.peak_bytes)
    limits = frozen.schedule.problem.memory_limit_bytes or (overall,) * schedule.problem.num_ranks
    peak = model.cp.new_int_var(0, overall, "peak")
    for rank, places in enumerate(model.free):
        at_peak = any(frozen.levels[rank][place + 1] == overall for place in places)
        _hold_memory(model, rank, peak if at_peak else min(overall, limits[rank]))
    model.cp.minimize(peak)
    return _solve(model, schedule, time_limit_s, seed, should_stop)


def window_at(schedule: Schedule, tick: int, num_operations: int) -> Window:
    """A window around the tick that holds about so many operations."""
    starts = sorted(start for times in evaluate(schedule).start for start in times)
    middle = sum(start < tick for start in starts)
    first = max(0, min(middle - num_operations // 2, len(starts) - num_operations))
    last = min(len(starts), first + num_operations) - 1
    return Window(starts[first], starts[last] + 1)


def peak_ticks(schedule: Schedule) -> list[int]:
    """Starts of all operations that lift a rank to the schedule's peak, in ticks."""
    timing, levels = evaluate(schedule), memory_levels(schedule)
    overall = max(timing.peak_bytes)
    return [
        start
        for starts, profile in zip(timing.start, levels, strict=True)
        for start, level in zip(starts, profile[1:], strict=True)
        if level == overall
    ]


def _in_units(schedule: Schedule) -> Schedule:
    """The same order, of a problem with memory in units that the program can add up over the makespan."""
    most_units = MOST_BYTE_TICKS // max(1, evaluate(schedule).makespan)
    return Schedule(in_memory_units(schedule.problem, most_units).problem, schedule.ranks)


def _freeze(schedule: Schedule) -> _Frozen:
    problem, timing = schedule.problem, evaluate(schedule)
    start = {
        op: s
        for order, starts in zip(schedule.ranks, timing.start, strict=True)
        for op, s in zip(order, starts, strict=True)
    }
    users: defaultdict[Op, list[Op]] = defaultdict(list)
    for op in start:
        for source in needs(start, op, problem):
            users[source].append(op)
    following = {a: b for order in schedule.ranks for a, b in pairwise(order)}
    path: dict[Op, int] = {}
    for op in sorted(start, key=lambda op: -start[op]):
        after = [path[following[op]]] if op in following else [0]
        after += [problem.transfer_ticks(op, user) + path[user] for user in users[op]]
        path[op] = problem.ticks(op) + max(after)
    return _Frozen(schedule, timing, memory_levels(schedule), start, path, users)


def _build(frozen: _Frozen, window: Window) -> _Model:
    """The program W1 to W5."""
    free = []
    for starts in frozen.timing.start:
        free.append(range(bisect_left(starts, window.begin), bisect_left(starts, window.end)))
    cp = cp_model.CpModel()
    horizon = frozen.timing.makespan
    model = _Model(frozen, free, cp, {}, cp.new_int_var(0, horizon, "makespan"))
    _start_variables(model)  # W2, W3
    _data_dependencies(model)  # W1
    _kept_order(model)  # W4
    for places, order in zip(free, frozen.schedule.ranks, strict=True):  # W5
        ticks = frozen.schedule.problem.ticks
        ops = [order[place] for place in places]
        cp.add_no_overlap([cp.new_fixed_size_interval_var(model.start[op], ticks(op), f"run {op}") for op in ops])
    return model


def _start_variables(model: _Model) -> None:
    frozen, problem = model.frozen, model.frozen.schedule.problem
    free = {order[place] for places, order in zip(model.free, frozen.schedule.ranks, strict=True) for place in places}
    for places, order in zip(model.free, frozen.schedule.ranks, strict=True):
        earliest = frozen.end(order[places[0] - 1]) if places and places[0] else 0
        behind = order[places[-1] + 1] if places and places[-1] + 1 < len(order) else None
        for op in (order[place] for place in places):
            after = [0 if behind is None else frozen.path[behind]]
            after += [problem.transfer_ticks(op, y) + frozen.path[y] for y in frozen.users[op] if y not in free]
            latest = frozen.timing.makespan - problem.ticks(op) - max(after)
            model.start[op] = model.cp.new_int_var(earliest, latest, str(op))
            model.cp.add(model.makespan >= model.start[op] + problem.ticks(op) + max(after))
            model.cp.add_hint(model.start[op], frozen.start[op])


def _data_dependencies(model: _Model) -> None:
    frozen, problem = model.frozen, model.frozen.schedule.problem
    for op, start in model.start.items():
        for source in needs(frozen.start, op, problem):
            source_start = model.start.get(source, frozen.start[source])
            model.cp.add(start >= source_start + problem.ticks(source) + problem.transfer_ticks(source, op))


def _kept_order(model: _Model) -> None:
    problem = model.frozen.schedule.problem
    for places, order in zip(model.free, model.frozen.schedule.ranks, strict=True):
        latest: dict[object, Op] = {}
        for op in (order[place] for place in places):
            chain = (op.pipeline, op.stage, Kind.B if op.kind is Kind.I else op.kind)
            for kept in (chain, ("in", channel_into(problem, op)), ("out", channel_from(problem, op))):
                if kept[1] is None:
                    continue
                before = latest.get(kept)
                if before is not None:
                    model.cp.add(model.start[op] >= model.start[before] + problem.ticks(before))
                latest[kept] = op


def _hold_memory(model: _Model, rank: int, cap: int | cp_model.IntVar) -> None:
    """W6 on one rank."""
    if not model.free[rank]:
        return
    frozen, pipelines = model.frozen, model.frozen.schedule.problem.pipelines
    order = [frozen.schedule.ranks[rank][place] for place in model.free[rank]]
    entry = frozen.levels[rank][model.free[rank][0]]
    begin, end = min(frozen.start[op] for op in order), frozen.timing.makespan
    held: dict[tuple[int, int, int, bool], list[int | cp_model.IntVar]] = {}  # from, until
    for op in order:
        key = (op.pipeline, op.stage, op.micro_batch)
        if op.kind in (Kind.B, Kind.I):
            held.setdefault((*key, True), [begin, end])[1] = model.start[op]
        if op.kind in (Kind.F, Kind.I):
            held[*key, op.kind is Kind.F] = [model.start[op], end]
        if op.kind is Kind.W:
            held.setdefault((*key, False), [begin, end])[1] = model.start[op]
    intervals, demands = [], []
    for (pipeline, stage, _, is_activation), (start, until) in held.items():
        taken = pipelines[pipeline].activation_bytes if is_activation else pipelines[pipeline].weight_grad_bytes
        if not taken[stage]:
            continue
        if isinstance(start, int):
            entry -= taken[stage]
        duration = model.cp.new_int_var(0, end, "")
        intervals.append(model.cp.new_interval_var(start, duration, until, f"held on {rank}"))
        demands.append(taken[stage])
    if intervals:
        model.cp.add_cumulative(intervals, demands, cap - entry)


def _solve(
    model: _Model, schedule: Schedule, time_limit_s: float, seed: int, should_stop: Callable[[], bool]
) -> Schedule:
    """A better order than the schedule's, whose memory is in bytes; or the schedule."""
    solver = make_solver(time_limit_s=time_limit_s, seed=seed)
    status = run(solver, model.cp, should_stop)
    is_rounded = model.frozen.schedule.problem != schedule.problem  # which may leave no room for the schedule itself
    assert status != cp_model.INFEASIBLE or is_rounded, "the schedule itself is a solution"
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return schedule
    ranks = []
    for places, order in zip(model.free, schedule.ranks, strict=True):
        inside = sorted((order[place] for place in places), key=lambda op: solver.value(model.start[op]))
        ranks.append(order[: places.start] + tuple(inside) + order[places.stop :] if places else order)
    found = Schedule(schedule.problem, tuple(ranks))
    old, new = evaluate(schedule), evaluate(found)
    is_worse = (new.makespan, max(new.peak_bytes)) > (old.makespan, max(old.peak_bytes))
    assert new.makespan <= old.makespan, "the program's makespan is the schedule's"
    return schedule if is_worse else found
