"""Constraint solvers as every program here wants them: reproducible, stoppable, and deaf to signals."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ortools.sat.python import cp_model


def make_solver(*, time_limit_s: float, seed: int) -> cp_model.CpSolver:
    """A solver of one thread. Signals stay the caller's: the solver's own handler would leave SIGINT deadly."""
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    solver.parameters.catch_sigint_signal = False
    return solver


def run(
    solver: cp_model.CpSolver, program: cp_model.CpModel, should_stop: Callable[[], bool]
) -> cp_model.CpSolverStatus:
    """The status in which the solver ends.

    Raises:
        ValueError: the program is invalid, for example by sums that 64 bits do not hold.
    """
    with Watch(solver, should_stop):
        status = solver.solve(program)
    if status == cp_model.MODEL_INVALID:
        fault = " ".join(program.validate().split())[:200]
        raise ValueError(f"the constraint program is invalid ({fault}): give ticks and bytes in coarser units")
    return status


class Watch:
    """While the solver runs, asks now and then whether it should stop."""

    def __init__(self, solver: cp_model.CpSolver, should_stop: Callable[[], bool]) -> None:
        self._solver = solver
        self._should_stop = should_stop
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cp-sat watch", daemon=True)

    def _watch(self) -> None:
        stop = False
        while not self._done.wait(0.05):
            stop = stop or self._should_stop()
            if stop:  # said again until it ends: before the search begins, nobody hears it
                self._solver.stop_search()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
