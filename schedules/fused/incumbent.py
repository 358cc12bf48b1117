"""The best schedule so far, shared by all parts of the solver: every offer is validated before it counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from schedules.ir import Problem, Schedule
from schedules.timing import evaluate
from schedules.validate import check


@dataclass(frozen=True, slots=True)
class Improvement:
    """One step of the solver's progress: when (seconds after its start), what, and which part found it."""

    seconds: float
    makespan: int
    peak_bytes: int
    found_by: str


class Deadline:
    """The time a solver may take, cut short by an event that anyone may set."""

    def __init__(self, time_limit_s: float, stop: threading.Event | None = None) -> None:
        self._start_s = time.monotonic()
        self._stop = stop
        self._ended = False
        self.time_limit_s = time_limit_s

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start_s

    @property
    def left_s(self) -> float:
        stopped = self._ended or (self._stop is not None and self._stop.is_set())
        return 0.0 if stopped else max(0.0, self.time_limit_s - self.elapsed_s)

    @property
    def is_over(self) -> bool:
        return self.left_s == 0.0

    def end_within(self, seconds: float) -> None:
        """Let all who watch this deadline finish in so long, if it does not end before."""
        self.time_limit_s = min(self.time_limit_s, self.elapsed_s + seconds)

    def end_now(self) -> None:
        """Let all who watch this deadline finish."""
        self._ended = True


class Incumbent:
    """Keeps the schedule with the smallest (makespan, peak bytes), and how it came to be."""

    def __init__(
        self, problem: Problem, deadline: Deadline, progress: Callable[[Improvement], None] | None = None
    ) -> None:
        self._problem = problem
        self._deadline = deadline
        self._progress = progress
        self._lock = threading.Lock()
        self._schedule: Schedule | None = None
        self.history: list[Improvement] = []

    @property
    def schedule(self) -> Schedule:
        assert self._schedule is not None, "the solver offers a start before anything else"
        return self._schedule

    @property
    def makespan(self) -> int:
        return self.history[-1].makespan

    @property
    def peak_bytes(self) -> int:
        return self.history[-1].peak_bytes

    def offer(self, schedule: Schedule, found_by: str) -> None:
        """Keep the schedule if it is the best so far; a part of the solver that offers an illegal one has a bug."""
        schedule = Schedule(self._problem, schedule.ranks)
        timing = evaluate(schedule)
        key = (timing.makespan, max(timing.peak_bytes))
        with self._lock:
            if self.history and key >= (self.makespan, self.peak_bytes):
                return
            check(schedule)
            self._schedule = schedule
            self.history.append(Improvement(self._deadline.elapsed_s, *key, found_by))
            if self._progress is not None:
                self._progress(self.history[-1])
