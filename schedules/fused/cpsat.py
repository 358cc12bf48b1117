"""The schedule as a constraint program: improves small problems to the optimum, proves it, or proves that nothing fits.

Sets: operations x (F and B, or F, I and W, of every pipeline, stage and micro-batch; F alone where there is no
backward), ranks r, forwards of stage s in micro-batch order F_0, F_1, ..., likewise backwards B_0, B_1, ... (I where
split) and W_0, W_1, ...

Variables: start(x) in the window [head(x), T - tail(x) - ticks(x)] of `schedules.bounds`; the makespan, or the peak.

Constraints:
  C1  start(x) >= start(p) + ticks(p) + transfer(p, x)                 x needs the result of p, or comes after it
  C2  start(x_{j+1}) >= start(x_j) + ticks(x_j)                        micro-batches of a chain stay in order
  C3  no two operations of a rank overlap
  C4  on every rank, the bytes held at any time are within its cap: each activation over [start(F_j), start(B_j)), each
      weight gradient's inputs over [start(I_j), start(W_j))
  C5  messages of one channel are received in the order sent: for channels that several stages share, the operations at
      both ends come in the same order
  C6  start(F_{j+K}) >= end(B_j)                                       where the cap holds K micro-batches of the stage;
      C4 implies it, but it makes the windows tight

Objective: the makespan; or, within a given makespan T, the largest peak of all ranks. A program without a solution
proves that no schedule keeps to both T and the caps.

C2 loses no optimum (see `schedules.bounds`). A program splits every backward that can be split, or none, and is exact
for schedules that do the same. Memory changes at starts, as in `schedules.ir`, and counts in bytes, or in coarser
units where 64 bits do not hold bytes times ticks (`memory_units`); where these are rounded, a program proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import combinations, pairwise

from ortools.sat.python import cp_model

from schedules.bounds import gradient_ticks, heads_and_tails, smallest_limits
from schedules.fused.cp_solver import make_solver, run
from schedules.fused.memory_units import MOST_BYTE_TICKS, MemoryUnits, in_memory_units
from schedules.ir import Kind, Op, Pipeline, Problem, Schedule
from schedules.timing import evaluate
from schedules.walk import Channel, channel_from, channel_into


class Outcome(StrEnum):
    """Solver status; `FOUND` has a schedule that is not proven best, `UNKNOWN` has none and proves nothing."""

    OPTIMAL = "optimal"
    FOUND = "found"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Result:
    """`value` (None without a schedule) and the proven lower `bound` of the objective, in ticks or bytes."""

    outcome: Outcome
    schedule: Schedule | None
    value: int | None
    bound: int


@dataclass(slots=True)
class _Model:
    problem: Problem
    split: bool
    makespan: int
    caps: tuple[int, ...]
    cp: cp_model.CpModel
    start: dict[Op, cp_model.IntVar]


def shortest(
    problem: Problem,
    *,
    split: bool,
    makespan: int,
    hint: Schedule | None = None,
    time_limit_s: float,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """The shortest schedule of at most `makespan` ticks within the problem's limits.

    Args:
        split: whether pipelines that can split run every backward as I and W; otherwise as B.
        hint: a schedule to start from, with the same operations.
    """
    units = in_memory_units(problem, MOST_BYTE_TICKS // max(1, makespan))
    limits = units.problem.memory_limit_bytes
    model = _build(units.problem, split, makespan, limits) if _is_feasible(units.problem, limits) else None
    if model is None:
        return _in_bytes(Result(Outcome.INFEASIBLE, None, None, makespan + 1), problem, units)
    end = model.cp.new_int_var(0, makespan, "makespan")
    for op, start in model.start.items():
        model.cp.add(end >= start + problem.ticks(op))
    model.cp.minimize(end)
    return _in_bytes(_solve(model, hint, makespan + 1, time_limit_s, seed, should_stop), problem, units)


def lowest_peak(
    problem: Problem,
    *,
    split: bool,
    makespan: int,
    below_bytes: int,
    time_limit_s: float,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """The schedule of at most `makespan` ticks with the smallest peak, if there is one below `below_bytes`."""
    units = in_memory_units(problem, MOST_BYTE_TICKS // max(1, makespan))
    below, limits = -(-below_bytes // units.num_bytes), units.problem.memory_limit_bytes
    caps = tuple(min(limit, below - 1) for limit in limits or (below,) * problem.num_ranks)
    model = _build(units.problem, split, makespan, caps) if _is_feasible(units.problem, caps) else None
    if model is None:
        infeasible = Result(Outcome.INFEASIBLE, None, None, below)
        return replace(_in_bytes(infeasible, problem, units), bound=below_bytes if units.is_exact else 0)
    peak = model.cp.new_int_var(max(smallest_limits(units.problem)), max(caps), "peak")
    for rank in range(problem.num_ranks):
        _hold_memory(model, rank, peak)
    model.cp.minimize(peak)
    return _peak_in_bytes(_solve(model, None, below, time_limit_s, seed, should_stop), problem, units, below_bytes)


def _is_feasible(problem: Problem, caps: tuple[int, ...] | None) -> bool:
    return caps is None or all(cap >= least for cap, least in zip(caps, smallest_limits(problem), strict=True))


def _in_bytes(result: Result, problem: Problem, units: MemoryUnits) -> Result:
    """The result for the problem itself: rounded memory proves nothing."""
    schedule = None if result.schedule is None else Schedule(problem, result.schedule.ranks)
    if units.is_exact:
        return replace(result, schedule=schedule)
    outcome = Outcome.UNKNOWN if schedule is None else Outcome.FOUND
    return Result(outcome, schedule, result.value, bound=0)


def _peak_in_bytes(result: Result, problem: Problem, units: MemoryUnits, below_bytes: int) -> Result:
    """As `_in_bytes`, of a result whose value and bound are memory."""
    found = _in_bytes(result, problem, units)
    value = None if found.schedule is None else max(evaluate(found.schedule).peak_bytes)
    return replace(found, value=value, bound=min(below_bytes, found.bound * units.num_bytes))


def _build(problem: Problem, split: bool, makespan: int, caps: tuple[int, ...] | None) -> _Model | None:
    """The program C1 to C6; None when an operation has no possible start, which proves it infeasible."""
    capped = replace(problem, memory_limit_bytes=caps)
    model = _Model(capped, split, makespan, caps or (), cp_model.CpModel(), {})
    if not _start_variables(model):
        return None
    _data_dependencies(model)  # C1
    _chain_order(model)  # C2
    _no_overlap(model)  # C3
    if caps is not None:
        for rank, cap in enumerate(caps):
            _hold_memory(model, rank, cap)  # C4
        _counting(model)  # C6
    _message_order(model)  # C5
    return model


def _start_variables(model: _Model) -> bool:
    """A start within its window for every operation; False when a window is empty."""
    heads, tails = heads_and_tails(model.problem)
    for number, pipeline in enumerate(model.problem.pipelines):
        for stage in range(pipeline.num_stages):
            for micro_batch in range(pipeline.num_micro_batches):
                head, tail = heads[number], tails[number]
                windows = {Kind.F: (int(head.forward[stage, micro_batch]), int(tail.forward[stage, micro_batch]))}
                if not pipeline.is_forward_only:
                    backward = (int(head.backward[stage, micro_batch]), int(tail.backward[stage, micro_batch]))
                    windows[Kind.B] = windows[Kind.I] = backward
                    windows[Kind.W] = (backward[0] + gradient_ticks(pipeline, stage), 0)
                for kind in model.problem.kinds(number, split=model.split):
                    op = Op(number, stage, micro_batch, kind)
                    earliest, tail_ticks = windows[kind]
                    latest = model.makespan - tail_ticks - model.problem.ticks(op)
                    if latest < earliest:
                        return False
                    model.start[op] = model.cp.new_int_var(earliest, latest, str(op))
    return True


def _data_dependencies(model: _Model) -> None:
    for op, start in model.start.items():
        for source in _sources(model, op):
            earliest = model.problem.ticks(source) + model.problem.transfer_ticks(source, op)
            model.cp.add(start >= model.start[source] + earliest)


def _chain_order(model: _Model) -> None:
    for chain in _chains(model):
        for first, second in pairwise(chain):
            model.cp.add(model.start[second] >= model.start[first] + model.problem.ticks(first))


def _no_overlap(model: _Model) -> None:
    on_rank: list[list[cp_model.IntervalVar]] = [[] for _ in range(model.problem.num_ranks)]
    for op, start in model.start.items():
        interval = model.cp.new_fixed_size_interval_var(start, model.problem.ticks(op), f"run {op}")
        on_rank[model.problem.rank_of(op)].append(interval)
    for intervals in on_rank:
        model.cp.add_no_overlap(intervals)


def _hold_memory(model: _Model, rank: int, cap: int | cp_model.IntVar) -> None:
    """Bytes are held from the start of the operation that takes them to the start of the one that gives them back."""
    intervals, demands = [], []
    for op, start in model.start.items():
        pipeline = model.problem.pipelines[op.pipeline]
        if model.problem.rank_of(op) != rank or op.kind not in (Kind.F, Kind.I) or pipeline.is_forward_only:
            continue
        held = pipeline.activation_bytes if op.kind is Kind.F else pipeline.weight_grad_bytes
        backward = _backward(model, pipeline)
        given_back = model.start[op._replace(kind=backward if op.kind is Kind.F else Kind.W)]
        if held[op.stage]:
            duration = model.cp.new_int_var(0, model.makespan, f"hold {op}")
            intervals.append(model.cp.new_interval_var(start, duration, given_back, f"held {op}"))
            demands.append(held[op.stage])
    model.cp.add_cumulative(intervals, demands, cap - model.problem.initial_bytes[rank])


def _counting(model: _Model) -> None:
    for number, pipeline in enumerate(model.problem.pipelines):
        backward = _backward(model, pipeline)
        for stage, rank in enumerate(pipeline.ranks):
            held = pipeline.activation_bytes[stage]
            room = model.caps[rank] - model.problem.initial_bytes[rank]
            if held:
                for micro_batch in range(pipeline.num_micro_batches - room // held):
                    freed = Op(number, stage, micro_batch, backward)
                    later = Op(number, stage, micro_batch + room // held, Kind.F)
                    model.cp.add(model.start[later] >= model.start[freed] + model.problem.ticks(freed))


def _message_order(model: _Model) -> None:
    """C5, for pairs from different stages of one channel; within a stage C2 has it."""
    senders: dict[Channel, list[tuple[Op, Op]]] = {}
    for op in model.start:
        channel = channel_from(model.problem, op)
        if channel is not None:
            step = 1 if op.kind is Kind.F else -1
            target = op._replace(stage=op.stage + step)
            assert channel_into(model.problem, target) == channel
            senders.setdefault(channel, []).append((op, target))
    for messages in senders.values():
        for (first, first_use), (second, second_use) in combinations(messages, 2):
            if first.stage != second.stage:
                in_order = model.cp.new_bool_var("")
                for a, b in ((first, second), (first_use, second_use)):
                    model.cp.add(model.start[a] < model.start[b]).only_enforce_if(in_order)
                    model.cp.add(model.start[a] > model.start[b]).only_enforce_if(~in_order)


def _solve(
    model: _Model,
    hint: Schedule | None,
    bound_if_infeasible: int,
    time_limit_s: float,
    seed: int,
    should_stop: Callable[[], bool],
) -> Result:
    if hint is not None:
        timing = evaluate(hint)
        for order, starts in zip(hint.ranks, timing.start, strict=True):
            for op, start in zip(order, starts, strict=True):
                model.cp.add_hint(model.start[op], start)
    solver = make_solver(time_limit_s=time_limit_s, seed=seed)
    status = run(solver, model.cp, should_stop)
    if status == cp_model.INFEASIBLE:
        return Result(Outcome.INFEASIBLE, None, None, bound_if_infeasible)
    bound = round(solver.best_objective_bound)
    if status == cp_model.UNKNOWN:
        return Result(Outcome.UNKNOWN, None, None, bound)
    orders: list[list[Op]] = [[] for _ in range(model.problem.num_ranks)]
    for op in sorted(model.start, key=lambda op: solver.value(model.start[op])):
        orders[model.problem.rank_of(op)].append(op)
    schedule = Schedule(model.problem, tuple(map(tuple, orders)))
    outcome = Outcome.OPTIMAL if status == cp_model.OPTIMAL else Outcome.FOUND
    return Result(outcome, schedule, round(solver.objective_value), bound)


def _backward(model: _Model, pipeline: Pipeline) -> Kind:
    return Kind.I if model.split and pipeline.can_split else Kind.B


def _chains(model: _Model) -> Iterable[list[Op]]:
    for number, pipeline in enumerate(model.problem.pipelines):
        for stage in range(pipeline.num_stages):
            for kind in model.problem.kinds(number, split=model.split):
                yield [Op(number, stage, micro_batch, kind) for micro_batch in range(pipeline.num_micro_batches)]


def _sources(model: _Model, op: Op) -> list[Op]:
    pipeline = model.problem.pipelines[op.pipeline]
    if op.kind is Kind.W:
        return [op._replace(kind=Kind.I)]
    if op.kind is Kind.F:
        return [*model.problem.first(op), *([op._replace(stage=op.stage - 1)] if op.stage else [])]
    own = op._replace(kind=Kind.F)
    return [own] if op.stage == pipeline.num_stages - 1 else [own, op._replace(stage=op.stage + 1)]
