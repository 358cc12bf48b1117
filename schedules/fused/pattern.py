"""A repeating pattern for many micro-batches: one period is solved, then unrolled between warm-up and cool-down.

A *period* of T ticks runs k_p micro-batches of every pipeline p on each of its stages; k_p are the smallest integers in
the proportion of the micro-batches. In the steady state period i starts operation x at sigma(x) + i T.

Sets: operations x = (pipeline p, stage s, copy c < k_p, kind F or B); ranks r.

Variables: sigma(x) = T q(x) + phi(x), 0 <= phi(x) < T; H, the most memory that a rank holds on average, times T.

Constraints:
  P1  sigma(x) >= sigma(y) + ticks(y) + transfer(y, x)      x needs the result of y
  P2  sigma(x_{c+1}) >= sigma(x_c) + ticks(x_c), and sigma(x_0) + T >= sigma(x_{k-1}) + ticks(x_{k-1})
  P3  no two operations of a rank overlap modulo T: the intervals at phi(x) and at phi(x) + T are disjoint
  P4  H >= h_r = sum over stages s on r and copies c of bytes(s) * (sigma(B_c) - sigma(F_c)) for every r

Objective: H, then the sum of all h_r and of the ends of the pipelines, which keeps lags short where memory does not.

Unrolled, a pipeline may run ahead of another: while one model's pipeline fills, the other works. The unrolled starts
are priorities of a list schedule, which fills warm-up and cool-down with whatever can run: an idle rank runs the ready
operation with the earliest one, either at once or unless an earlier one arrives before that would be done. How far
ahead which model runs best is searched for, in ever smaller steps.

Source: Lin et al., Tessel: Boosting distributed execution of large DNN models via flexible schedule search, HPCA 2024
(solved repetends); modulo scheduling after Rau, Iterative modulo scheduling, MICRO 1994. Running ahead is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray
from ortools.sat.python import cp_model

from schedules.fused.compiled import Compiled
from schedules.fused.cp_solver import make_solver, run
from schedules.fused.list_schedule import list_schedule
from schedules.fused.memory_units import MOST_BYTE_TICKS, in_memory_units
from schedules.ir import Kind, Op, Problem, Schedule
from schedules.walk import needs

MOST_COPIES = 8  # of all pipelines' micro-batches in one period
_COARSE_STEPS = 16  # at first, from no running ahead to all of a pattern's periods in flight


@dataclass(frozen=True, slots=True)
class Pattern:
    """One period: `start` of every operation whose micro-batch is below `copies` of its pipeline, in ticks."""

    problem: Problem
    period_ticks: int
    copies: tuple[int, ...]
    start: dict[Op, int]

    @property
    def num_periods_in_flight(self) -> int:
        """Periods under way at the same time in the steady state."""
        return max(self.start.values()) // self.period_ticks + 1


def find_pattern(
    problem: Problem,
    *,
    time_limit_s: float,
    work_limit: float = math.inf,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Pattern | None:
    """The pattern that holds least memory; None when none is found in time, or a period would not be short.

    Nor is there one with forward-only pipelines, which hold nothing.

    Memory counts in units as coarse as the program needs. Where 64 bits do not hold even those there is no pattern.

    Args:
        work_limit: in the constraint solver's deterministic time, which gives the same pattern on every machine.
    """
    if any(pipeline.is_forward_only for pipeline in problem.pipelines):
        return None
    divisor = math.gcd(*(pipeline.num_micro_batches for pipeline in problem.pipelines))
    copies = tuple(pipeline.num_micro_batches // divisor for pipeline in problem.pipelines)
    if sum(copies) > MOST_COPIES:
        return None
    ops = [
        Op(number, stage, copy, kind)
        for number, pipeline in enumerate(problem.pipelines)
        for stage in range(pipeline.num_stages)
        for copy in range(copies[number])
        for kind in (Kind.F, Kind.B)
    ]
    work = [0] * problem.num_ranks
    for op in ops:
        work[problem.rank_of(op)] += problem.ticks(op)
    period = max(work)
    cp = cp_model.CpModel()
    # Two periods per stage, and the transfers, are far more than any useful lag.
    horizon = 2 * max(p.num_stages * (period + p.transfer_ticks) for p in problem.pipelines)
    try:
        weighed = _in_units(problem, copies, horizon)
    except ValueError:
        return None
    start = {op: cp.new_int_var(0, horizon, f"sigma {op}") for op in ops}
    _keep_dependencies(problem, cp, start)  # P1
    _keep_chain_order(problem, cp, start, copies, period)  # P2
    _keep_ranks_apart(problem, cp, start, period, horizon)  # P3
    held = _held(weighed, start)  # P4
    most = horizon * sum(max(1, weighed.bytes_taken(op)) for op in ops)
    held_most = cp.new_int_var(0, most, "H")
    for rank_held in held:
        cp.add(held_most >= rank_held)
    ends = [variable for op, variable in start.items() if op.stage == 0 and op.kind is Kind.B]
    cp.minimize(cp_model.LinearExpr.sum([problem.num_ranks * held_most, *held, *ends]))
    solver = make_solver(time_limit_s=time_limit_s, seed=seed)
    solver.parameters.max_deterministic_time = work_limit
    solver.parameters.interleave_search = True  # neighbourhood search too, which finds shorter lags sooner
    status = run(solver, cp, should_stop)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return Pattern(problem, period, copies, {op: solver.value(variable) for op, variable in start.items()})


def _in_units(problem: Problem, copies: tuple[int, ...], horizon: int) -> Problem:
    """One period, with its memory in units: the objective adds up what all ranks hold over the horizon, for each."""
    pipelines = tuple(
        replace(pipeline, num_micro_batches=count) for pipeline, count in zip(problem.pipelines, copies, strict=True)
    )
    period = replace(problem, pipelines=pipelines, memory_limit_bytes=None, initial_bytes=(0,) * problem.num_ranks)
    return in_memory_units(period, MOST_BYTE_TICKS // (horizon * problem.num_ranks**2)).problem


def _keep_dependencies(problem: Problem, cp: cp_model.CpModel, start: dict[Op, cp_model.IntVar]) -> None:
    for op, variable in start.items():
        for source in needs(start, op, problem):
            cp.add(variable >= start[source] + problem.ticks(source) + problem.transfer_ticks(source, op))


def _keep_chain_order(
    problem: Problem, cp: cp_model.CpModel, start: dict[Op, cp_model.IntVar], copies: tuple[int, ...], period: int
) -> None:
    for number, pipeline in enumerate(problem.pipelines):
        for stage in range(pipeline.num_stages):
            for kind in (Kind.F, Kind.B):
                chain = [Op(number, stage, copy, kind) for copy in range(copies[number])]
                for first, second in pairwise(chain):
                    cp.add(start[second] >= start[first] + problem.ticks(first))
                cp.add(start[chain[0]] + period >= start[chain[-1]] + problem.ticks(chain[-1]))


def _keep_ranks_apart(
    problem: Problem, cp: cp_model.CpModel, start: dict[Op, cp_model.IntVar], period: int, horizon: int
) -> None:
    on_rank: list[list[cp_model.IntervalVar]] = [[] for _ in range(problem.num_ranks)]
    for op, variable in start.items():
        offset = cp.new_int_var(0, period - 1, f"phi {op}")
        turns = cp.new_int_var(0, horizon // period, f"q {op}")
        cp.add(variable == period * turns + offset)
        for shift in (0, period):
            interval = cp.new_fixed_size_interval_var(offset + shift, problem.ticks(op), f"run {op}")
            on_rank[problem.rank_of(op)].append(interval)
    for intervals in on_rank:
        cp.add_no_overlap(intervals)


def _held(problem: Problem, start: dict[Op, cp_model.IntVar]) -> list[cp_model.LinearExprT]:
    terms: list[list[cp_model.LinearExprT]] = [[] for _ in range(problem.num_ranks)]
    for op, variable in start.items():
        if op.kind is Kind.F:
            lasts = start[op._replace(kind=Kind.B)] - variable
            terms[problem.rank_of(op)].append(problem.bytes_taken(op) * lasts)
    return [cp_model.LinearExpr.sum(rank_terms) for rank_terms in terms]


def unroll(
    pattern: Pattern, compiled: Compiled, ahead: tuple[int, ...], caps: NDArray[np.int64], *, patient: bool = True
) -> Schedule | None:
    """All micro-batches by list scheduling; None when the pipelines block one another under the caps.

    Args:
        compiled: the pattern's problem, with whole backwards.
        ahead: per pipeline, ticks by which it runs ahead of the pattern.
        caps: bytes per rank.
        patient: whether a rank waits for an earlier operation that arrives before the ready one would be done.
    """
    priority = np.zeros(len(compiled.ops), np.int64)
    for op, start in pattern.start.items():
        copies = pattern.copies[op.pipeline]
        num_periods = pattern.problem.pipelines[op.pipeline].num_micro_batches // copies
        first = compiled.node_of[op]  # a chain's nodes are in micro-batch order
        starts = start - ahead[op.pipeline] + pattern.period_ticks * np.arange(num_periods)
        priority[first : first + num_periods * copies : copies] = starts
    return list_schedule(compiled, priority, caps, patient=patient)


def shortest_unrolling(
    pattern: Pattern,
    compiled: Compiled,
    caps: NDArray[np.int64],
    *,
    target: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> Schedule | None:
    """The shortest unrolled schedule of a search over how far each model runs ahead; None when all block under caps.

    First one model at a time runs ahead, in coarse steps. Then, from the best of these, each model's lead grows or
    shrinks by a step; where neither helps, the step is halved, down to one tick. Replicas (pipelines that differ in
    ranks alone) run ahead together. Ends early at `target` ticks. `compiled` and `caps` are those of `unroll`.
    """
    shapes = [replace(p, name="-", ranks=(0,) * p.num_stages) for p in pattern.problem.pipelines]
    models = list(dict.fromkeys(shapes))
    leads = (0,) * len(models)
    best: tuple[int, tuple[int, ...], Schedule] | None = None
    tried: set[tuple[int, ...]] = set()

    def attempt(leads: tuple[int, ...]) -> bool:
        """Whether these are better than any before."""
        nonlocal best
        is_better = False
        if leads in tried:
            return False
        tried.add(leads)
        ahead = tuple(leads[models.index(shape)] for shape in shapes)
        for patient in (True, False):
            if should_stop() or (best is not None and best[0] <= target):
                break
            schedule = unroll(pattern, compiled, ahead, caps, patient=patient)
            if schedule is not None:
                makespan = compiled.evaluate(schedule)[0]
                if best is None or makespan < best[0]:
                    best, is_better = (makespan, leads, schedule), True
        return is_better

    def moved(leads: tuple[int, ...], model: int, ticks: int) -> tuple[int, ...]:
        return (*leads[:model], leads[model] + ticks, *leads[model + 1 :])

    span = pattern.num_periods_in_flight * pattern.period_ticks
    for part, model in product(range(_COARSE_STEPS + 1), range(len(models))):
        attempt(moved(leads, model, span * part // _COARSE_STEPS))
    step = span // _COARSE_STEPS // 2
    while best is not None and step and not should_stop():
        around = [moved(best[1], model, ticks) for model in range(len(models)) for ticks in (step, -step)]
        if not any(map(attempt, around)):
            step //= 2
    return None if best is None else best[2]
