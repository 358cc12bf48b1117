"""The schedules of a run: the first update trains serially, and the next ones by the stage times that it showed.

A schedule is solved for each combination of numbers of micro-batches that models have when they train at once. It is
solved again when a stage's share of the time has drifted from the one that the schedule was made for.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from fuse.intrastage.cost_profile import Profile, Shape
from fuse.intrastage.forward_only import without_scorers
from fuse.intrastage.measurement_store import Measured, MeasurementStore
from fuse.intrastage.micro_batch_number import TIMES, Work, median_gap_s, shapes_of, soonest
from fuse.intrastage.observed import TRAIN, ObservedCosts, drift_of, one_of_each
from fuse.intrastage.opposite import has_opposites
from fuse.intrastage.placement import Counts, Replica, describe, num_micro_batches, replicas_of, share_ranks
from fuse.intrastage.plan_gain import plan_gain, ticks_unfused
from fuse.intrastage.plan_settings import DRIFT_UPDATES, PlanSettings
from fuse.intrastage.training_schedule import (
    Plan,
    fused_problem,
    fused_schedule,
    halved_serial_schedule,
    serial_schedule,
    serial_step_s,
    solved,
)
from fuse.trace import Span
from schedules import Schedule
from schedules.fused.cache import ScheduleCache

_logger = logging.getLogger(__name__)


class TrainingPlanner:
    """Decides the schedule of every optimizer step.

    store: what earlier runs of the same models have measured; it keeps what this one measures.
    unfused, update_s: as of `Measured`.
    """

    def __init__(
        self,
        placement: tuple[Replica, ...],
        settings: PlanSettings,
        store: MeasurementStore,
        unfused: Measured | None = None,
        update_s: float | None = None,
    ) -> None:
        self.placement, self._settings, self._store, self._unfused = placement, settings, store, unfused
        self._planned_update_s = update_s
        self.is_fused = settings.fused and share_ranks(placement)
        self._watches = self.is_fused or settings.chooses_number
        self._plans: dict[Counts, Plan] = {}
        self._unsearched: dict[Counts, Callable[..., Plan]] = {}  # what finds better ones
        self._num_planned = 0  # updates that were trained by them
        self._profile: Profile | None = None
        self._times: dict[str, float] = {}  # as many micro-batches as were drawn, by what was drawn
        self._gap_s = 0.0
        known = store.load() if self._watches else None
        if known is not None and known.placement == without_scorers(placement):
            self._profile, self._times = known.profile, dict(known.times)
        pipelines = serial_schedule(placement, 1 + max(one.index for one in placement)).problem.pipelines
        self._observed = ObservedCosts(
            {one.name: two.name for one, two in zip(pipelines, placement, strict=True)},
            {one.name: f"{one.scores}.{one.index}" for one in placement if one.scores is not None},
        )
        self._num_drifted = 0
        self._lasting = 1 if self._profile is None else DRIFT_UPDATES
        self._unfused_ticks: dict[Counts, tuple[int, int]] = {}  # of all ranks, and of those busy
        self._update_unfused: list[Counts] = []
        self._uncompared: tuple[Sequence[Counts], Shape] | None = None  # counts with new plans, and a typical shape
        self._gains: dict[Counts, float] = {}
        self._update_s: float | None = None  # of the last update's training
        self._updates_left = settings.num_updates
        self._scorers = frozenset(replica.model for replica in placement if replica.scores is not None)

    def times(
        self,
        drawn: Sequence[Counts],
        works: Callable[[float], Sequence[Work]],
        free_bytes: Callable[[], int | None] = lambda: None,
    ) -> float | None:
        """How many times as many micro-batches as were drawn an update is to have; it is decided once.

        None before that is known: the update's micro-batches are then to be of several sizes, and will show it.

        drawn: of the update's rounds. works: the rounds with so many times the micro-batches. free_bytes: as of
        `plans`.
        """
        key = "; ".join(dict.fromkeys(map(describe, drawn)))
        if key not in self._times and self._settings.chooses_number:
            if not all(map(self._knows, drawn)):
                self._learn([shape for times in TIMES for shape in one_of_each(shapes_of(works(times)))])
            if not all(map(self._knows, drawn)):
                return None
            self._times[key] = self._soonest(works, free_bytes)
            self._save()
        return self._times.get(key, 1.0)

    def _soonest(self, works: Callable[[float], Sequence[Work]], free_bytes: Callable[[], int | None]) -> float:
        """Rounds that are alike in numbers share a schedule, as in plans; all searches take half as long as for one."""
        profile, settings, least_tokens = self._profile, self._settings, self._observed.least_tokens
        assert profile is not None
        if least_tokens is None:
            _logger.info("micro-batches as they were drawn: what others would cost has not been observed")
            return 1.0
        drawn = works(1.0)
        memory_limit = (settings.memory_limit_bytes or free_bytes()) if self.is_fused else None
        num_searches = len(TIMES) * len({one.counts for one in drawn})
        limit_s = min(settings.time_limit_s, self._training_s(drawn[0].counts, shapes_of(drawn))) / 2 / num_searches
        known: dict[Counts, Schedule] = {}

        def schedule(work: Work) -> Schedule:
            replicas, counts = replicas_of(self.placement, work.counts), work.counts
            if not self.is_fused:
                return serial_schedule(replicas, counts)
            if counts not in known:
                largest = settings.longest or one_of_each(shapes_of([work]))[2]
                problem = fused_problem(profile, replicas, counts, work.typical, memory_limit, largest)
                known[counts] = solved(problem, limit_s, settings.num_workers).schedule
            return known[counts]

        return soonest(works, profile, self.placement, schedule, least_tokens=least_tokens, gap_s=self._gap_s)

    def plans(
        self,
        counts: Iterable[Counts],
        shapes: Sequence[Shape],
        free_bytes: Callable[[], int | None] = lambda: None,
        unfused: Iterable[Counts] | None = None,
        *,
        waits: bool = True,
    ) -> dict[Counts, Plan]:
        """The plan for each of `counts`, those of an update's rounds; solving takes no longer than its training did.

        shapes: of the micro-batches to train on. free_bytes: on a device, if known; asked where there is no limit.
        unfused: what the update's rounds would have without fusion; None for the same. waits: for searches; else what
        is new trains by greedy schedules, until `search` is called.

        Raises:
            ValueError: a device's memory limit is too low for one micro-batch.
        """
        self.compare()
        counts = list(counts)
        if not self.is_fused:
            return {
                one: Plan(
                    serial_schedule(replicas_of(self.placement, one), one),
                    is_watched=self._watches and not self._knows(one),
                )
                for one in counts
            }
        if not all(map(self._knows, counts)):
            self._learn(one_of_each(shapes))
        missing = [one for one in dict.fromkeys(counts) if one not in self._plans and self._knows(one)]
        if not self._plans:
            self._gains.clear()
            self._unfused_ticks.clear()  # not when plans are dropped: the update's report comes after that
        memory_limit = self._settings.memory_limit_bytes or (free_bytes() if missing else None)
        for one in missing:
            limit_s = min(self._settings.time_limit_s, self._training_s(one, shapes)) / len(missing)
            in_this_update = self._settings.steps_per_update * counts.count(one) / len(counts)
            num_steps = int(in_this_update * self._updates_left / (1 + self._num_planned))  # as rare as it was so far
            plan = partial(self._plan, one, one_of_each(shapes), memory_limit, num_steps)
            self._plans[one] = plan(limit_s if waits else None)
            if not waits:
                self._unsearched[one] = partial(plan, limit_s)
        self._update_unfused = counts if unfused is None else list(unfused)
        self._uncompared = missing, one_of_each(shapes)[1]
        return {one: self._plans[one] if one in self._plans else self._watched(one) for one in counts}

    def compare(self) -> None:
        """Find what the update would take without fusion, and what new plans gain: once devices train, for reports."""
        if self._uncompared is None:
            return
        (new, typical), self._uncompared = self._uncompared, None
        for one in self._update_unfused:
            if one not in self._unfused_ticks and self._knows(one):
                assert self._profile is not None
                unfused = None if self._scorers_in(one) else self._unfused  # whose stages scorers do not have
                self._unfused_ticks[one] = ticks_unfused(self._profile, self.placement, one, typical, unfused)
        if has_opposites(self.placement) or self._scorers:
            self._gains |= {one: self._gain(one) for one in new}

    def search(self, stop: threading.Event) -> None:
        """Search for the schedules that `plans` has not waited for, until `stop`; later updates train by them."""
        while self._unsearched and not stop.is_set():
            counts, plan = self._unsearched.popitem()
            self._plans[counts] = plan(stop=stop)
            if counts in self._gains:
                self._gains[counts] = self._gain(counts)

    def will_solve(self, counts: Iterable[Counts]) -> bool:
        """Whether `plans` will search for schedules, asked for these counts."""
        missing = set(counts) - self._plans.keys()
        return self.is_fused and any(
            self._knows(one) or _names(self.placement, one) <= self._observed.pipelines for one in missing
        )

    @property
    def serial_bubble_ratio(self) -> float | None:
        """Idle share that the update's training would have without fusion, in stages cut for that; None where it is
        not known.
        """
        self.compare()
        if not self._update_unfused or not self._unfused_ticks.keys() >= set(self._update_unfused):
            return None
        ticks = [self._unfused_ticks[one] for one in self._update_unfused]
        return 1 - sum(busy for _, busy in ticks) / sum(total for total, _ in ticks)

    def _knows(self, counts: Counts) -> bool:
        """Whether there is a profile of all that trains."""
        measured = () if self._profile is None else self._profile.stages
        return _names(self.placement, counts) <= {stage.pipeline for stage in measured}

    @property
    def is_learning(self) -> bool:
        """Whether micro-batches are to show what they cost."""
        return self._watches and self._profile is None and not _names(self.placement, 1) <= self._observed.pipelines

    def _learn(self, shapes: Sequence[Shape]) -> None:
        """Make a profile of what has been observed, if that is enough."""
        profile = self._observed.profile(shapes)
        if profile is not None:
            self._profile = profile
            self._save()

    def _save(self) -> None:
        placement = without_scorers(self.placement)
        self._store.save(Measured(placement, self._profile, self._unfused, self._planned_update_s, dict(self._times)))

    def _watched(self, counts: Counts) -> Plan:
        """One that shows what is not known yet."""
        return Plan(halved_serial_schedule(replicas_of(self.placement, counts), counts), is_watched=True)

    @property
    def opposite_gain(self) -> float | None:
        """Seconds of a step by plain 1F1B over those planned, less one; None without opposite replicas.

        Of several plans in use, the mean. Where there are scorers, plain 1F1B comes after their forwards.
        """
        self.compare()
        known = list(self._gains.values())
        return statistics.fmean(known) if known and has_opposites(self.placement) else None

    @property
    def forward_only_gain(self) -> float | None:
        """As `opposite_gain`, of the plans with scorers: over those of scoring, then plain 1F1B."""
        self.compare()
        known = [gain for counts, gain in self._gains.items() if self._scorers_in(counts)]
        return statistics.fmean(known) if known else None

    @property
    def report(self) -> dict[str, float]:
        """`bubble/serial`, `gain/bidirectional` and `gain/forward_only`, where they are known."""
        known = {
            "bubble/serial": self.serial_bubble_ratio,
            "gain/bidirectional": self.opposite_gain,
            "gain/forward_only": self.forward_only_gain if self.scorers else None,
        }
        return {name: value for name, value in known.items() if value is not None}

    @property
    def scorers(self) -> frozenset[str]:
        """What is to be scored within training: all that can be, until plans say that nothing is gained by it."""
        gain = self.forward_only_gain
        return (
            self._scorers
            if self.is_fused and (self._settings.forces_scorers or gain is None or gain > 0)
            else frozenset()
        )

    def _scorers_in(self, counts: Counts) -> list[str]:
        return [one for one in sorted(self._scorers) if num_micro_batches(counts, one)]

    def observe(self, spans: Sequence[Span]) -> None:
        """Learn from an update's spans of all ranks; forget plans that no longer hold."""
        self.compare()
        if not self._watches:
            return
        self._gap_s = median_gap_s(spans)
        trained = [span for span in spans if span.category == TRAIN]
        if trained:
            self._updates_left -= 1
            self._num_planned += bool(self._plans)
            self._update_s = max(one.end_s for one in trained) - min(one.start_s for one in trained)
        drift = drift_of(trained)
        has_drifted = drift is not None and drift > self._settings.replan_drift
        if has_drifted and not self._num_drifted:
            self._observed.forget()  # what held before
        self._observed.add(spans)
        if drift is not None:
            self._num_drifted = self._num_drifted + 1 if has_drifted else 0
        if self._num_drifted == self._lasting:
            _logger.info("stage times are %.0f%% off the plan's: planning again", 100 * (drift or 0.0))
            self._num_drifted, self._lasting = 0, DRIFT_UPDATES
            self._plans, self._num_planned, self._profile = {}, 0, None

    def _training_s(self, counts: Counts, shapes: Sequence[Shape]) -> float:
        """Seconds that the last update trained; before there is one, of a step if one rank worked at a time."""
        if self._update_s is not None:
            return self._update_s
        assert self._profile is not None
        return serial_step_s(self._profile, replicas_of(self.placement, counts), counts, one_of_each(shapes)[1])

    def _plan(
        self,
        counts: Counts,
        shapes: tuple[Shape, Shape, Shape],
        memory_limit_bytes: int | None,
        num_steps: int,
        time_limit_s: float | None,
        stop: threading.Event | None = None,
    ) -> Plan:
        settings, profile = self._settings, self._profile
        assert profile is not None
        _, typical, largest = shapes
        schedule = fused_schedule(
            profile,
            replicas_of(self.placement, counts),
            counts,
            typical,
            largest=settings.longest or largest,
            memory_limit_bytes=memory_limit_bytes,
            cache=ScheduleCache(settings.directory),
            time_limit_s=time_limit_s,
            num_steps=num_steps,
            num_workers=settings.num_workers,
            stop=stop,
        )
        return Plan(schedule, profile)

    def _gain(self, counts: Counts) -> float:
        return plan_gain(
            *(self._plans[counts], counts, self._unfused_ticks[counts]),
            (self._planned_update_s, None if self._unfused is None else self._unfused.update_s),
            is_opposite=has_opposites(self.placement),
            scorers=self._scorers_in(counts),
        )


def _names(placement: Sequence[Replica], counts: Counts) -> frozenset[str]:
    """What profiles call the pipelines of what trains."""
    return frozenset(replica.name for replica in replicas_of(placement, counts))
