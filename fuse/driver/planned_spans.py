"""When an update's operations were to run: told by the driver, beside what they took, so that no rank need know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fuse.intrastage.micro_batch_number import Work
from fuse.intrastage.placement import Counts, Replica, replicas_of
from fuse.intrastage.planned_times import PlannedTimes, planned_times, with_planned
from fuse.intrastage.training_schedule import Plan
from fuse.trace import Span
from schedules import Schedule


@dataclass(frozen=True, slots=True)
class PlannedSpans:
    """The plans of an update's rounds, in turn; None of a round of which nothing was measured before.

    tensor_parallel_size: workers that a rank of the schedules has.
    """

    rounds: Sequence[tuple[Schedule, PlannedTimes | None]]
    tensor_parallel_size: int

    @classmethod
    def of(
        cls,
        works: Iterable[Work],
        plans: Mapping[Counts, Plan],
        placement: Sequence[Replica],
        tensor_parallel_size: int,
    ) -> PlannedSpans:
        """works: the micro-batches of each round."""
        rounds = [(plan.schedule, _times(one, plan, placement)) for one in works for plan in (plans[one.counts],)]
        return cls(rounds, tensor_parallel_size)

    def beside(self, spans: Sequence[Sequence[Span]]) -> list[list[Span]]:
        """Each worker's spans of the update, those of operations with when they were to run."""
        return [
            with_planned(own, self._of_rank(worker // self.tensor_parallel_size)) for worker, own in enumerate(spans)
        ]

    def _of_rank(self, rank: int) -> Iterator[tuple[float, float] | None]:
        for schedule, planned in self.rounds:
            yield from [None] * len(schedule.ranks[rank]) if planned is None else planned.of_rank(rank)


def _times(work: Work, plan: Plan, placement: Sequence[Replica]) -> PlannedTimes | None:
    if plan.profile is None:
        return None
    replicas = replicas_of(placement, work.counts)
    return planned_times(plan.schedule, plan.profile, [one.name for one in replicas], work.of(replicas))
