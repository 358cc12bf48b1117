"""The optimum of tiny problems by enumeration: the reference that bounds and solvers are tested against."""

from __future__ import annotations

from dataclasses import dataclass, field

from schedules.bounds import check_feasible, heads_and_tails
from schedules.ir import Kind, Op, Problem, Schedule
from schedules.walk import needs

MAX_OPERATIONS = 32


@dataclass(slots=True)
class _Search:
    """State of the depth-first search: the partial schedule, and the best complete one so far."""

    problem: Problem
    tails: dict[Op, int]
    orders: list[list[Op]]
    free_at: list[int]
    held_bytes: list[int]
    end: dict[Op, int] = field(default_factory=dict)
    best: tuple[int, int] | None = None  # makespan, peak bytes
    best_orders: tuple[tuple[Op, ...], ...] = ()


def optimum(problem: Problem) -> Schedule:
    """The schedule with the smallest makespan, and of those one with the smallest peak, by trying all orders.

    Operations are appended in the order of their starts, then of their ranks, so that every schedule without needless
    waits is met once. Micro-batches of a chain stay in order, by which nothing is lost (see `schedules.bounds`).
    Exponential.

    Raises:
        ValueError: the problem is infeasible, or has more than `MAX_OPERATIONS` operations.
    """
    check_feasible(problem)
    num_operations = sum((2 - p.is_forward_only) * p.num_stages * p.num_micro_batches for p in problem.pipelines)
    if num_operations > MAX_OPERATIONS:
        raise ValueError(f"{num_operations} operations are too many to enumerate; the most is {MAX_OPERATIONS}")
    tails: dict[Op, int] = {}
    for number, (pipeline, tail) in enumerate(zip(problem.pipelines, heads_and_tails(problem)[1], strict=True)):
        for stage in range(pipeline.num_stages):
            for micro_batch in range(pipeline.num_micro_batches):
                tails[Op(number, stage, micro_batch, Kind.F)] = int(tail.forward[stage, micro_batch])
                for kind in () if pipeline.is_forward_only else (Kind.B, Kind.I):
                    tails[Op(number, stage, micro_batch, kind)] = int(tail.backward[stage, micro_batch])
    ranks = range(problem.num_ranks)
    search = _Search(problem, tails, [[] for _ in ranks], [0 for _ in ranks], list(problem.initial_bytes))
    _extend(search, (0, 0), list(problem.initial_bytes))
    assert search.best is not None, "a feasible problem has a schedule"
    return Schedule(problem, search.best_orders)


def _extend(search: _Search, last: tuple[int, int], peaks: list[int]) -> None:
    candidates = list(_next_operations(search))
    if not candidates:
        makespan = max(search.free_at)
        if search.best is None or (makespan, max(peaks)) < search.best:
            search.best = (makespan, max(peaks))
            search.best_orders = tuple(map(tuple, search.orders))
        return
    limits = search.problem.memory_limit_bytes
    for op in candidates:
        rank = search.problem.rank_of(op)
        start = _start(search, op, rank)
        level = search.held_bytes[rank] + search.problem.bytes_taken(op)
        if (start, rank) < last or (limits is not None and level > limits[rank]):
            continue
        peak = max(peaks[rank], level)
        end = start + search.problem.ticks(op)
        if search.best is not None and (end + search.tails.get(op, 0), max(peak, *peaks)) >= search.best:
            continue
        free_at, held, old_peak = search.free_at[rank], search.held_bytes[rank], peaks[rank]
        search.orders[rank].append(op)
        search.end[op], search.free_at[rank], search.held_bytes[rank], peaks[rank] = end, end, level, peak
        _extend(search, (start, rank), peaks)
        search.orders[rank].pop()
        del search.end[op]
        search.free_at[rank], search.held_bytes[rank], peaks[rank] = free_at, held, old_peak


def _next_operations(search: _Search) -> list[Op]:
    """The next operation of every chain whose needs are scheduled; a backward as B and, where it can be split, as I."""
    found = []
    for number, pipeline in enumerate(search.problem.pipelines):
        for stage in range(pipeline.num_stages):
            chains = ((Kind.F,), (Kind.B, Kind.I) if pipeline.can_split else (Kind.B,), (Kind.W,))
            for kinds in chains[:1] if pipeline.is_forward_only else chains:
                for micro_batch in range(pipeline.num_micro_batches):
                    ops = [Op(number, stage, micro_batch, kind) for kind in kinds]
                    if any(op in search.end for op in ops):
                        continue
                    ready = [op for op in ops if all(n in search.end for n in needs(search.end, op, search.problem))]
                    found.extend(ready)
                    if ready or Kind.W not in kinds:
                        break
    return found


def _start(search: _Search, op: Op, rank: int) -> int:
    sources = needs(search.end, op, search.problem)
    arrivals = [search.end[source] + search.problem.transfer_ticks(source, op) for source in sources]
    return max([search.free_at[rank], *arrivals])
