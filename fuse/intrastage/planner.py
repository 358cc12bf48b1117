"""The schedules of a run: measured once, solved per number of micro-batches, and anew when the measurements drift."""

from __future__ import annotations

import json
import logging
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuse.intrastage.placement import Replica
from fuse.intrastage.plan import Plan, fused_schedule, serial_schedule
from fuse.intrastage.profile import Profile, Shape, profile_to_json
from fuse.trace import Span
from schedules.fused.cache import ScheduleCache

_logger = logging.getLogger(__name__)

PROFILE_NAME = "profile.json"

_DRIFT_UPDATES = 10
"""Updates in a row that must have drifted: planning takes longer than some updates, and disturbances pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """How training is scheduled.

    fused: actor and critic at once; if not, one after the other.
    time_limit_s, num_workers: for the solver, per schedule. num_steps: optimizer steps of the run.
    memory_limit_bytes: for the micro-batches under way on a device; None: what it has free, on CPUs no limit.
    replan_drift: measure and solve again once a stage's share of the time is off by this much, 0.3 being 30 %.
    directory: where the run's measurements and schedules are kept.
    """

    fused: bool
    time_limit_s: float
    num_workers: int
    num_steps: int
    memory_limit_bytes: int | None
    replan_drift: float
    directory: Path


class Planner:
    """Decides the schedule of every optimizer step."""

    def __init__(self, placement: tuple[Replica, ...], settings: PlanSettings) -> None:
        self.placement, self._settings = placement, settings
        self._is_fused = settings.fused and len({rank for replica in placement for rank in replica.ranks}) > 1
        self._plans: dict[int, Plan] = {}
        self._profile: Profile | None = None
        self._free_bytes: int | None = None
        self._drifts: deque[float] = deque(maxlen=_DRIFT_UPDATES)

    def plans(
        self,
        counts: Iterable[int],
        shapes: Sequence[Shape],
        measure: Callable[[Sequence[int]], tuple[Profile, int | None]],
    ) -> dict[int, Plan]:
        """The plan for each number of micro-batches in `counts`.

        shapes: of the micro-batches to train on.
        measure: profiles those whose indices into `shapes` it is given, and tells the bytes free on a device, if known.

        Raises:
            ValueError: a device's memory limit is too low for one micro-batch.
        """
        order = sorted(range(len(shapes)), key=lambda index: (shapes[index].size, shapes[index]))
        smallest, median, largest = order[0], order[len(order) // 2], order[-1]
        missing = sorted(set(counts) - self._plans.keys())
        if missing and self._is_fused and self._profile is None:
            self._profile, self._free_bytes = measure(_one_of_each([smallest, median, largest], shapes))
            self._save(self._profile)
        for count in missing:
            self._plans[count] = self._plan(count, shapes[median], shapes[largest])
        return {count: self._plans[count] for count in counts}

    @property
    def serial_bubble_ratio(self) -> float | None:
        """Idle share that training would have without fusion, over the plans there are; None where it is not known."""
        ratios = [plan.serial_bubble_ratio for plan in self._plans.values()]
        known = [ratio for ratio in ratios if ratio is not None]
        return statistics.fmean(known) if known else None

    def observe(self, spans: Iterable[Span]) -> None:
        """Learn from an update's executed operations; forget profile and plans when they no longer hold."""
        drift = _drift(spans)
        if drift is None:
            return
        self._drifts.append(drift)
        if len(self._drifts) == _DRIFT_UPDATES and min(self._drifts) > self._settings.replan_drift:
            _logger.info("stage times are %.0f%% off the profile: measuring and planning again", 100 * drift)
            self._drifts.clear()
            self._plans, self._profile = {}, None

    def _save(self, profile: Profile) -> None:
        self._settings.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(profile_to_json(profile), indent=1)
        (self._settings.directory / PROFILE_NAME).write_text(text + "\n")

    def _plan(self, count: int, typical: Shape, largest: Shape) -> Plan:
        if self._profile is None:
            return Plan(serial_schedule(self.placement, count))
        settings = self._settings
        schedule = fused_schedule(
            self._profile,
            self.placement,
            count,
            typical,
            largest=largest,
            memory_limit_bytes=settings.memory_limit_bytes or self._free_bytes,
            cache=ScheduleCache(settings.directory),
            time_limit_s=settings.time_limit_s,
            num_steps=settings.num_steps,
            num_workers=settings.num_workers,
        )
        return Plan(schedule, self._profile)


def _one_of_each(indices: Sequence[int], shapes: Sequence[Shape]) -> list[int]:
    return list({shapes[index]: index for index in indices}.values())


def _drift(spans: Iterable[Span]) -> float | None:
    """How far a stage's executed over planned time is from the median stage's; None without planned operations.

    A machine that is slower all over changes no schedule, so only the proportions between stages count.
    """
    executed: defaultdict[str, float] = defaultdict(float)
    planned: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        start_s, end_s = span.arguments.get("planned_start_s"), span.arguments.get("planned_end_s")
        if isinstance(start_s, float) and isinstance(end_s, float):
            stage = span.name.rpartition(".")[0]
            executed[stage] += span.duration_s
            planned[stage] += end_s - start_s
    ratios = [executed[stage] / planned[stage] for stage in planned if planned[stage] > 0]
    if not ratios:
        return None
    typical = statistics.median(ratios)
    return max(abs(ratio / typical - 1) for ratio in ratios)
