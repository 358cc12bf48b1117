"""The solver: finds the shortest schedule, then the one that needs least memory, and says how good it is.

1. Starts: every baseline, greedy, reservation list scheduling, and for many micro-batches a repeating pattern, unrolled
   with each model more or less ahead of the others.
2. Makespan: annealing from the best start and from fresh ones, down to the lower bound.
3. Memory: at the makespan reached, annealing under caps below the peak, from the best schedule and from fresh starts.

Constraint programming improves on 2 and 3: small problems as a whole, which also proves what is best, large ones window
by window. Workers are threads of one process; native code and the constraint solver run without the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from math import inf

from schedules.bounds import check_feasible, makespan_lower_bound, peak_memory_lower_bound
from schedules.formats import schedule_to_json
from schedules.fused.coarse import coarsened
from schedules.fused.incumbent import Deadline, Improvement
from schedules.fused.portfolio import Objective, Portfolio
from schedules.ir import Problem, Schedule
from schedules.timing import evaluate

__all__ = ["Improvement", "Objective", "Solution", "Status", "solution_to_json", "solve"]

_MOST_SECONDS, _MOST_WORKERS = 1e7, 1024
_NUM_SEEDS = 1 << 31  # what the constraint solver takes


class Status(StrEnum):
    """What is known of a solution: all of its objective proven optimal, its makespan proven optimal, or neither."""

    OPTIMAL = "optimal"
    MAKESPAN_OPTIMAL = "makespan optimal"
    FEASIBLE = "feasible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A validated schedule, how good it is, and how it was found. Ticks and bytes are the problem's."""

    schedule: Schedule
    makespan: int
    peak_bytes: int
    makespan_lower_bound: int
    memory_lower_bound: int  # of the peak, at this makespan; at any where the makespan alone is minimised
    status: Status
    found_by: str
    seconds: float
    history: tuple[Improvement, ...]

    @property
    def makespan_gap(self) -> float:
        """How far the makespan can be above the best, as a share of the bound."""
        return self.makespan / self.makespan_lower_bound - 1

    @property
    def memory_gap(self) -> float:
        """How far the peak can be above the best at this makespan, as a share of the bound."""
        return self.peak_bytes / self.memory_lower_bound - 1 if self.memory_lower_bound else 0.0


def solve(
    problem: Problem,
    *,
    time_limit_s: float = 30.0,
    num_workers: int = 2,
    seed: int = 0,
    objective: Objective = Objective.MAKESPAN_THEN_MEMORY,
    memory_time_s: float = inf,
    progress: Callable[[Improvement], None] | None = None,
    stop: threading.Event | None = None,
) -> Solution:
    """The best schedule found in the time given; earlier when it is proven best, or once `stop` is set.

    memory_time_s: of it, at most for lowering the peak; a search for the makespan that takes long leaves a third of it
        or less.

    Durations of more ticks than native code counts are searched in coarser ones; all that is told is in the problem's.
    `progress` is called with each improvement, from any worker's thread. Seeds make each part reproducible; what the
    parts get done in a time limit also depends on the machine.

    Raises:
        ValueError: the problem is infeasible (the line names the rank and the smallest limit that would do), or
            a parameter is out of range.
    """
    if not 0 < time_limit_s <= _MOST_SECONDS:
        raise ValueError(f"time_limit_s {time_limit_s} must be positive and at most {_MOST_SECONDS:g}")
    if not 1 <= num_workers <= _MOST_WORKERS:
        raise ValueError(f"num_workers {num_workers} must be from 1 to {_MOST_WORKERS}")
    if not 0 <= seed < _NUM_SEEDS:
        raise ValueError(f"seed {seed} must be from 0 to {_NUM_SEEDS - 1}")
    check_feasible(problem)
    deadline = Deadline(time_limit_s, stop)
    coarse, factor = coarsened(problem)
    told = None if progress is None else lambda one: progress(_in_own_ticks(one, factor))
    portfolio = Portfolio(coarse, deadline, objective, seed, num_workers, told, memory_time_s)
    portfolio.offer_constructions()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="solve") as workers:
        try:
            _side_by_side(portfolio.shorten, workers, num_workers)
            deadline.end_within(memory_time_s)
            _side_by_side(portfolio.lower_peak, workers, num_workers)
        finally:
            deadline.end_now()  # on an error too, or the other workers would keep the pool open
    return _solution(portfolio, problem, factor)


def _side_by_side(phase: Callable[[int], None], workers: ThreadPoolExecutor, num_workers: int) -> None:
    """Have all workers do it; raises what the first of them does that fails."""
    running = [workers.submit(phase, worker) for worker in range(num_workers)]
    wait(running, return_when=FIRST_EXCEPTION)
    for finished in running:
        if finished.done():
            finished.result()


def _in_own_ticks(improvement: Improvement, factor: int) -> Improvement:
    return replace(improvement, makespan=factor * improvement.makespan)


def _solution(portfolio: Portfolio, problem: Problem, factor: int) -> Solution:
    """Of the problem, whose ticks the portfolio may have searched in multiples of."""
    best = portfolio.incumbent
    schedule, makespan = best.schedule, best.makespan
    makespan_bound, memory_bound = portfolio.makespan_bound, portfolio.memory_bound(makespan)
    if factor > 1:
        schedule = Schedule(problem, schedule.ranks)
        makespan, makespan_bound = evaluate(schedule).makespan, makespan_lower_bound(problem)
        if portfolio.objective is Objective.MAKESPAN_THEN_MEMORY:
            memory_bound = peak_memory_lower_bound(problem, makespan)
    status = Status.FEASIBLE
    if makespan == makespan_bound:
        done = portfolio.objective is Objective.MAKESPAN or best.peak_bytes == memory_bound
        status = Status.OPTIMAL if done else Status.MAKESPAN_OPTIMAL
    return Solution(
        schedule=schedule,
        makespan=makespan,
        peak_bytes=best.peak_bytes,
        makespan_lower_bound=makespan_bound,
        memory_lower_bound=memory_bound,
        status=status,
        found_by=best.history[-1].found_by,
        seconds=portfolio.deadline.elapsed_s,
        history=tuple(_in_own_ticks(one, factor) for one in best.history),
    )


def solution_to_json(solution: Solution) -> dict[str, object]:
    """A JSON object: figures, proof, history, and the schedule in the form that `schedules.formats` reads."""
    return {
        "makespan": solution.makespan,
        "peak_bytes": solution.peak_bytes,
        "makespan_lower_bound": solution.makespan_lower_bound,
        "memory_lower_bound": solution.memory_lower_bound,
        "status": str(solution.status),
        "found_by": solution.found_by,
        "seconds": solution.seconds,
        "history": [asdict(improvement) for improvement in solution.history],
        "schedule": schedule_to_json(solution.schedule),
    }
