"""What the solver's workers do: each phase is a loop that any number of them run side by side on a shared incumbent."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from math import inf
from random import Random

from schedules.baselines import chimera, interleaved, one_f_one_b, serial, zero_bubble_h1, zero_bubble_v
from schedules.bounds import makespan_lower_bound, peak_memory_lower_bound, smallest_limits
from schedules.fused import cpsat, pattern, windows
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
_FIRST_STEPS = 500_000  # of an annealing run, and so many more per operation
_STEPS_PER_OPERATION = 1_000
_MAKESPAN_SHARE = 0.7  # of the time, when the bound is not reached before
_EXACT_OPERATIONS = 600  # at most so many for constraint programming on the whole problem
_FIRST_EXACT_SHARE = 0.15  # of the time for its first attempt at the peak; the rest later, with a lower peak to beat
_WINDOW_OPERATIONS = (100, 300)  # as many for windows of larger ones
_WINDOW_S = 2.0  # for one window
_WINDOWS_SHARE = 0.08  # of the time for one round of windows
_WINDOWS_EVERY = 4  # annealing runs of the last worker
_MODERATE_MEMORY = 1.35  # times what one model after the other needs
_MODERATE_ATTEMPTS = 2
_MODERATE_STEP = 0.15  # more for each further worker
# How far below the peak an attempt aims, as a share of it: at first; later at random, farther from a fresh start.
_FIRST_REACH = 0.12
_FRESH_REACH = (0.01, 0.04)
_NEAR_REACH = (0.0005, 0.01)
_RATCHET = 4  # once it gets there, it goes on by this part of it
_PATIENCE = 4  # attempts in vain before the next take twice the steps
_FAR_REACH = 0.05  # so far is farther than the incumbent's neighbourhood: start afresh
_MEMORY_ATTEMPTS_FROM = 10_000
_MEMORY_STEPS, _MOST_STEPS = 3, 24  # times as many as for the makespan: at first, and at most
_PATTERN_OPERATIONS = 8000  # from so many on, a repeating pattern is one of the starts
_PATTERN_SHARE = 0.05  # of the time to find it
_UNROLLING_SHARE = 0.1  # of the time for how far which model runs ahead


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
        memory_time_s: float = inf,
    ) -> None:
        self.problem = problem
        self.deadline = deadline
        self.objective = objective
        self.seed = seed
        self.num_workers = num_workers
        limit_s = deadline.time_limit_s
        self.makespan_time_s = max(_MAKESPAN_SHARE * limit_s, limit_s - memory_time_s)
        if objective is Objective.MAKESPAN:
            self.makespan_time_s = limit_s
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
        """Schedules that need no search: greedy, which always exists, and, in time, the baselines for such problems."""
        self.incumbent.offer(greedy(self.problem), "greedy")
        constructions = {
            f"serial {baseline.__name__}": partial(serial, self.problem, baseline)
            for baseline in (one_f_one_b, interleaved, zero_bubble_h1, zero_bubble_v)
        }
        for name, construct in {**constructions, "chimera": partial(chimera, self.problem)}.items():
            if not self.deadline.is_over:
                self._offer_baseline(name, construct)

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
            if worker == self.num_workers - 1:
                if self.small and attempt == 1:
                    self._shorten_exactly()
                elif not self.small and attempt % _WINDOWS_EVERY == _WINDOWS_EVERY - 1:
                    self._shorten_windows(Random(self._seed(worker, attempt)))
            moderate = worker % 2 == 0 and attempt < _MODERATE_ATTEMPTS
            caps = memory_caps(self.problem, self._moderate_bytes() if moderate else UNLIMITED_BYTES)
            form = self._form(worker + attempt)
            seed = self._seed(worker, attempt)
            start = None
            if moderate or (worker + attempt) % 2 == 1:
                start = self._reservation_start(form, caps, self.makespan_bound, seed)
            if attempt == 0 and worker == self.num_workers - 1 and self.num_operations >= _PATTERN_OPERATIONS:
                self._offer_pattern(caps)
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
        """At the incumbent's makespan, aim for a cap some way below its peak, again and again.

        A run that gets there goes on from where it is with a lower cap. One that fails proves nothing: the next aims
        less far, and in the end anywhere down to the least step, with more and more steps.
        """
        if self.objective is Objective.MAKESPAN:
            return
        speed = Speed.guess(self.num_operations)
        makespan = self.incumbent.makespan
        reach, num_steps = _FIRST_REACH / (1 + worker), _MEMORY_STEPS * self._first_steps()
        attempt = num_failures = 0
        while not self._peak_is_settled(makespan):
            if self.small and attempt == 1 and worker == self.num_workers - 1:
                self._lower_peak_exactly(makespan, _FIRST_EXACT_SHARE * self.deadline.time_limit_s)
            peak = self.incumbent.peak_bytes
            cap = self._cap_below(peak, reach, makespan)
            if attempt == 0:  # the makespan may have been reached with far more memory than is needed
                cap = min(cap, int(self._moderate_bytes() * (1 + _MODERATE_STEP * worker)))
            aim = [max(cap, self.memory_bound(makespan))]

            def tighten(schedule: Schedule, reach: float = reach, aim: list[int] = aim) -> Caps | None:
                self._offer(schedule, "annealing")
                if self._peak_is_settled(makespan):
                    return None
                aim[0] = self._cap_below(self.incumbent.peak_bytes, reach / _RATCHET, makespan)
                return memory_caps(self.problem, aim[0])

            caps = memory_caps(self.problem, aim[0])
            form = self._form(worker + attempt)
            seed = self._seed(worker, _MEMORY_ATTEMPTS_FROM + attempt)
            fresh = reach > _FAR_REACH or attempt % 2 == 0
            start = self._reservation_start(form, caps, makespan, seed) if fresh else None
            anneal(
                form,
                start or in_form_of(form, self.incumbent.schedule),
                caps,
                makespan,
                seed=seed,
                num_steps=num_steps,
                regime=2 * (worker + attempt),  # no hot starts: the schedule is near its best already
                speed=speed,
                deadline=self.deadline,
                is_stale=lambda aim=aim: self.incumbent.peak_bytes <= aim[0],  # type: ignore[misc]
                tighten=tighten,
            )
            if self.incumbent.peak_bytes >= peak:
                num_failures += 1
                random = Random(seed)
                least, most = _NEAR_REACH if attempt % 2 == 0 else _FRESH_REACH  # of the next attempt
                reach = reach / 2 if reach > 2 * most else least * (most / least) ** random.random()
                if num_failures % _PATIENCE == 0:
                    num_steps = min(2 * num_steps, _MOST_STEPS * self._first_steps())
                    if worker == self.num_workers - 1:
                        self._lower_peak_by_program(random, makespan)
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

    def _lower_peak_exactly(self, makespan: int, slice_s: float) -> None:
        """Constraint programming below the incumbent's peak, until that is lower; what it proves becomes the bound."""
        peak = self.incumbent.peak_bytes
        result = cpsat.lowest_peak(
            self.problem,
            split=self.split,
            makespan=makespan,
            below_bytes=peak,
            time_limit_s=min(slice_s, self._exact_slice_s()),
            seed=self.seed,
            should_stop=lambda: self._peak_is_settled(makespan) or self.incumbent.peak_bytes < peak,
        )
        if result.schedule is not None:
            self._offer(result.schedule, "cp-sat")
        if self.split_is_exact:
            self.memory_bound_at[makespan] = max(self.memory_bound(makespan), result.bound)

    def _shorten_windows(self, random: Random) -> None:
        """A round of constraint programming on random windows of the incumbent."""
        schedule, until_s = self.incumbent.schedule, self._end_of_round_s()
        while self.deadline.elapsed_s < until_s and not self._makespan_is_settled():
            window = windows.window_at(
                schedule, random.randrange(self.incumbent.makespan), random.randint(*_WINDOW_OPERATIONS)
            )
            schedule = windows.shorten(
                schedule,
                window,
                time_limit_s=min(_WINDOW_S, self.deadline.left_s),
                seed=random.randrange(2**31),
                should_stop=self._makespan_is_settled,
            )
            self._offer(schedule, "cp-sat windows")

    def _lower_peak_by_program(self, random: Random, makespan: int) -> None:
        if self.small:
            self._lower_peak_exactly(makespan, self.deadline.time_limit_s)
        else:
            self._lower_windows(random, makespan)

    def _lower_windows(self, random: Random, makespan: int) -> None:
        """A round of constraint programming on windows around operations that lift a rank to the incumbent's peak."""
        schedule, until_s = self.incumbent.schedule, self._end_of_round_s()
        while self.deadline.elapsed_s < until_s and not self._peak_is_settled(makespan):
            tick = random.choice(windows.peak_ticks(schedule))
            schedule = windows.lower_peak(
                schedule,
                windows.window_at(schedule, tick, random.randint(*_WINDOW_OPERATIONS)),
                time_limit_s=min(_WINDOW_S, self.deadline.left_s),
                seed=random.randrange(2**31),
                should_stop=partial(self._peak_is_settled, makespan),
            )
            self._offer(schedule, "cp-sat windows")

    def _end_of_round_s(self) -> float:
        return self.deadline.elapsed_s + _WINDOWS_SHARE * self.deadline.time_limit_s

    def _exact_slice_s(self) -> float:
        """All the time left, or half of it where no other worker goes on searching."""
        return self.deadline.left_s if self.num_workers > 1 else self.deadline.left_s / 2

    def _peak_is_settled(self, makespan: int) -> bool:
        return self.deadline.is_over or self.incumbent.peak_bytes <= self.memory_bound(makespan)

    def _makespan_is_settled(self) -> bool:
        out_of_time = self.deadline.elapsed_s > self.makespan_time_s
        return out_of_time or self.deadline.is_over or self.incumbent.makespan <= self.makespan_bound

    def _reservation_start(self, form: Compiled, caps: Caps, target: int, seed: int) -> Schedule | None:
        """The best reservation schedule of a short search, which is offered, too."""
        wanted_s = max(_RESERVATION_S, _RESERVATION_S_PER_OPERATION * self.num_operations)
        slice_s = min(wanted_s, 0.1 * self.deadline.time_limit_s)
        start = reservation_start(form, caps, target, seed, slice_s, self.deadline)
        if start is not None:
            self._offer(start, "reservation")
        return start

    def _offer_pattern(self, caps: Caps) -> None:
        """The shortest schedule unrolled from a repeating pattern.

        Annealing goes on from the reservation start all the same: from there it gets further (32 ranks x 128, in 60 s).
        """
        found = pattern.find_pattern(
            self.problem,
            time_limit_s=_PATTERN_SHARE * self.deadline.time_limit_s,
            seed=self.seed,
            should_stop=self._makespan_is_settled,
        )
        if found is None:
            return
        until_s = self.deadline.elapsed_s + _UNROLLING_SHARE * self.deadline.time_limit_s
        schedule = pattern.shortest_unrolling(
            found,
            compile_problem(self.problem, split=False),
            caps,
            target=self.makespan_bound,
            should_stop=lambda: self.deadline.elapsed_s > until_s or self._makespan_is_settled(),
        )
        if schedule is not None:
            self._offer(schedule, "pattern")

    def _first_steps(self) -> int:
        return _FIRST_STEPS + _STEPS_PER_OPERATION * self.num_operations

    def _moderate_bytes(self) -> int:
        """A third more than one model after the other needs, but no less than some schedule needs."""
        return max(self.moderate_bytes, max(smallest_limits(self.problem)))

    def memory_bound(self, makespan: int) -> int:
        """Of the peak at this makespan; of any makespan where memory is no objective, for that takes a moment only."""
        if self.objective is Objective.MAKESPAN:
            return max(smallest_limits(self.problem))
        if makespan not in self.memory_bound_at:
            self.memory_bound_at[makespan] = peak_memory_lower_bound(self.problem, makespan)
        return self.memory_bound_at[makespan]

    def _cap_below(self, peak: int, reach: float, makespan: int) -> int:
        return max(self.memory_bound(makespan), min(peak - 1, int(peak * (1 - reach))))

    def _seed(self, worker: int, attempt: int) -> int:
        return (self.seed * 1_000_003 + attempt) * 64 + worker

    def _form(self, turn: int) -> Compiled:
        return self.forms[turn % len(self.forms)]

    def _offer(self, schedule: Schedule, found_by: str) -> None:
        self.incumbent.offer(join_halves(schedule), found_by)
