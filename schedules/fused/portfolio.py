"""What the solver's workers do: each phase is a loop that any number of them run side by side on a shared incumbent."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial

from schedules.baselines import chimera, interleaved, one_f_one_b, serial, zero_bubble_h1, zero_bubble_v
from schedules.bounds import makespan_lower_bound, peak_memory_lower_bound, smallest_limits
from schedules.fused import cpsat
from schedules.fused.compiled import Compiled, compile_problem
from schedules.fused.greedy import greedy
from schedules.fused.halves import halves_lose_nothing, in_form_of, join_halves, splitting_is_free
from schedules.fused.incumbent import Deadline, Improvement, Incumbent
from schedules.fused.local_search import UNLIMITED_BYTES, Caps, Speed, anneal, memory_caps, reservation_start
from schedules.ir import Problem, Schedule
from schedules.timing import evaluate
from schedules.validate import violations

_RESERVATION_S = 0.5
_RESERVATION_S_PER_OPERATION = 1.2e-4
_FIRST_STEPS = 200_000  # of an annealing run, and so many more per operation
_STEPS_PER_OPERATION = 400
_MAKESPAN_SHARE = 0.7  # of the time, when the bound is not reached before
_EXACT_OPERATIONS = 600  # at most so many for constraint programming on the whole problem
_MODERATE_MEMORY = 1.35  # times what one model after the other needs
_MODERATE_ATTEMPTS = 2
_MODERATE_STEP = 0.15  # more for each further worker
_INTERVAL_SHARE = 0.3  # how far into the interval between bound and peak the first worker goes
_CLOSED_INTERVAL = 0.01  # of the peak
_REOPENED_INTERVAL = 0.08
_MEMORY_ATTEMPTS_FROM = 10_000


class Objective(StrEnum):
    """What is minimised: the makespan, or the makespan and then the largest peak of all ranks."""

    MAKESPAN = "makespan"
    MAKESPAN_THEN_MEMORY = "makespan-then-memory"


class Portfolio:
    """What the workers share: the problem in native form, the incumbent, the bounds."""

    def __init__(
        self,
        problem: Problem,
        deadline: Deadline,
        objective: Objective,
        seed: int,
        num_workers: int,
        progress: Callable[[Improvement], None] | None,
    ) -> None:
        self.problem = problem
        self.deadline = deadline
        self.objective = objective
        self.seed = seed
        self.num_workers = num_workers
        self.incumbent = Incumbent(problem, deadline, progress)
        # Free halves leave only their order to choose; where they cost time, workers take turns between the two forms.
        self.split = splitting_is_free(problem)
        can_split = any(pipeline.can_split for pipeline in problem.pipelines)
        forms = (self.split,) if self.split or not can_split else (False, True)
        self.forms = tuple(compile_problem(problem, split=split) for split in forms)
        self.split_is_exact = halves_lose_nothing(problem)
        self.num_operations = max(len(form.ops) for form in self.forms)
        self.small = self.num_operations <= _EXACT_OPERATIONS
        self.makespan_bound = makespan_lower_bound(problem)
        self.memory_bound_at: dict[int, int] = {}
        self.moderate_bytes = UNLIMITED_BYTES

    def offer_constructions(self) -> None:
        """Schedules that need no search: greedy, which always exists, and every baseline that takes the problem."""
        self.incumbent.offer(greedy(self.problem), "greedy")
        for baseline in (one_f_one_b, interleaved, zero_bubble_h1, zero_bubble_v):
            self._offer_baseline(f"serial {baseline.__name__}", partial(serial, self.problem, baseline))
        self._offer_baseline("chimera", partial(chimera, self.problem))

    def _offer_baseline(self, name: str, construct: Callable[[], Schedule]) -> None:
        try:
            schedule = construct()
        except ValueError:  # it is for problems of another shape
            return
        self.moderate_bytes = min(self.moderate_bytes, int(_MODERATE_MEMORY * max(evaluate(schedule).peak_bytes)))
        if not violations(schedule):
            self.incumbent.offer(schedule, name)

    def shorten(self, worker: int) -> None:
        """Anneal towards the makespan bound; workers differ in seeds, in where they begin again, and in memory.

        Every second worker first looks among schedules of moderate memory: the next phase then has less to do.
        """
        speed = Speed.guess(self.num_operations)
        num_steps = self._first_steps()
        attempt = 0
        while not self._makespan_is_settled():
            if self.small and attempt == 1 and worker == self.num_workers - 1:
                self._shorten_exactly()
            moderate = worker % 2 == 0 and attempt < _MODERATE_ATTEMPTS
            caps = memory_caps(self.problem, self._moderate_bytes() if moderate else UNLIMITED_BYTES)
            form = self._form(worker + attempt)
            seed = self._seed(worker, attempt)
            start = None
            if moderate or (worker + attempt) % 2 == 1:
                start = self._reservation_start(form, caps, self.makespan_bound, seed)
            found = anneal(
                form,
                start or in_form_of(form, self.incumbent.schedule),
                caps,
                self.makespan_bound,
                seed=seed,
                num_steps=num_steps,
                regime=worker + attempt,
                speed=speed,
                deadline=self.deadline,
                is_stale=self._makespan_is_settled,
            )
            if found is not None:
                self._offer(found, "annealing")
            attempt += 1
            num_steps += num_steps // 2

    def lower_peak(self, worker: int) -> None:
        """At the incumbent's makespan, bisect for the lowest common cap that has a schedule.

        A failed attempt proves nothing, so when the interval is used up it opens again with twice the steps per
        attempt. Workers go into the interval by different shares.
        """
        if self.objective is Objective.MAKESPAN:
            return
        speed = Speed.guess(self.num_operations)
        makespan = self.incumbent.makespan
        share = _INTERVAL_SHARE / 2 ** (worker % 3)
        floor, num_steps, attempt = self.memory_bound(makespan), self._first_steps(), 0
        while not self._peak_is_settled(makespan):
            if self.small and attempt == 1 and worker == self.num_workers - 1:
                self._lower_peak_exactly(makespan)
            bound = self.memory_bound(makespan)
            peak = self.incumbent.peak_bytes
            if peak - floor <= _CLOSED_INTERVAL * peak:
                floor = max(bound, int(peak * (1 - _REOPENED_INTERVAL)))
                num_steps *= 2
            cap = max(bound, min(peak - 1, peak - int((peak - floor) * share)))
            if attempt == 0:  # the makespan may have been reached with far more memory than is needed
                cap = max(bound, min(cap, int(self._moderate_bytes() * (1 + _MODERATE_STEP * worker))))
            caps = memory_caps(self.problem, cap)
            form = self._form(worker + attempt)
            seed = self._seed(worker, _MEMORY_ATTEMPTS_FROM + attempt)
            start = self._reservation_start(form, caps, makespan, seed) if attempt % 2 == 0 else None
            found = anneal(
                form,
                start or in_form_of(form, self.incumbent.schedule),
                caps,
                makespan,
                seed=seed,
                num_steps=num_steps,
                regime=2 * (worker + attempt),  # no hot starts: the schedule is near its best already
                speed=speed,
                deadline=self.deadline,
                is_stale=lambda cap=cap: self.incumbent.peak_bytes <= cap,  # type: ignore[misc]
            )
            if found is not None:
                self._offer(found, "annealing")
            if self.incumbent.peak_bytes > cap:
                floor = max(floor, cap)
            attempt += 1

    def _shorten_exactly(self) -> None:
        """Constraint programming from the incumbent; what it proves becomes the bound."""
        result = cpsat.shortest(
            self.problem,
            split=self.split,
            makespan=self.incumbent.makespan,
            hint=in_form_of(self.forms[0], self.incumbent.schedule),
            time_limit_s=self._exact_slice_s(),
            seed=self.seed,
            should_stop=self._makespan_is_settled,
        )
        if result.schedule is not None:
            self._offer(result.schedule, "cp-sat")
        if self.split_is_exact:
            self.makespan_bound = max(self.makespan_bound, result.bound)

    def _lower_peak_exactly(self, makespan: int) -> None:
        """Constraint programming below the incumbent's peak; what it proves becomes the bound."""
        result = cpsat.lowest_peak(
            self.problem,
            split=self.split,
            makespan=makespan,
            below_bytes=self.incumbent.peak_bytes,
            time_limit_s=self._exact_slice_s(),
            seed=self.seed,
            should_stop=lambda: self._peak_is_settled(makespan),
        )
        if result.schedule is not None:
            self._offer(result.schedule, "cp-sat")
        if self.split_is_exact:
            self.memory_bound_at[makespan] = max(self.memory_bound(makespan), result.bound)

    def _exact_slice_s(self) -> float:
        """All the time left, or half of it where no other worker goes on searching."""
        return self.deadline.left_s if self.num_workers > 1 else self.deadline.left_s / 2

    def _peak_is_settled(self, makespan: int) -> bool:
        return self.deadline.is_over or self.incumbent.peak_bytes <= self.memory_bound(makespan)

    def _makespan_is_settled(self) -> bool:
        share = 1.0 if self.objective is Objective.MAKESPAN else _MAKESPAN_SHARE
        out_of_time = self.deadline.elapsed_s > share * self.deadline.time_limit_s
        return out_of_time or self.deadline.is_over or self.incumbent.makespan <= self.makespan_bound

    def _reservation_start(self, form: Compiled, caps: Caps, target: int, seed: int) -> Schedule | None:
        """The best reservation schedule of a short search; offered as it is a schedule in its own right."""
        wanted_s = max(_RESERVATION_S, _RESERVATION_S_PER_OPERATION * self.num_operations)
        slice_s = min(wanted_s, 0.1 * self.deadline.time_limit_s)
        start = reservation_start(form, caps, target, seed, slice_s, self.deadline)
        if start is not None:
            self._offer(start, "reservation")
        return start

    def _first_steps(self) -> int:
        return _FIRST_STEPS + _STEPS_PER_OPERATION * self.num_operations

    def _moderate_bytes(self) -> int:
        """A third more than one model after the other needs, and enough for any schedule."""
        return max(self.moderate_bytes, max(smallest_limits(self.problem)))

    def memory_bound(self, makespan: int) -> int:
        if makespan not in self.memory_bound_at:
            self.memory_bound_at[makespan] = peak_memory_lower_bound(self.problem, makespan)
        return self.memory_bound_at[makespan]

    def _seed(self, worker: int, attempt: int) -> int:
        return (self.seed * 1_000_003 + attempt) * 64 + worker

    def _form(self, turn: int) -> Compiled:
        return self.forms[turn % len(self.forms)]

    def _offer(self, schedule: Schedule, found_by: str) -> bool:
        return self.incumbent.offer(join_halves(schedule), found_by)
