"""How many micro-batches an optimizer step is trained in: those that were drawn, or more and smaller ones.

Of more micro-batches a pipeline has smaller bubbles (by 1F1B (S - 1) / (N + S - 1) of N on S stages), and where they
are padded, less of that. Each costs what operations take whatever its size, and what lies between two of them.
Both are observed, so that the step is planned with every number. Of those that are over about as soon as the soonest
the largest is taken: as many micro-batches are under way, and smaller ones hold less. There are never fewer than were
drawn: these may take all the memory there is.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fuse.intrastage.cost_profile import Profile, Shape
from fuse.intrastage.observed import TRAIN, one_of_each
from fuse.intrastage.placement import Counts, Replica, describe, replica_micro_batches, replicas_of
from fuse.intrastage.planned_times import CostLine, planned_times
from fuse.trace import Span
from schedules import Kind, Schedule

_logger = logging.getLogger(__name__)

TIMES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Times as many micro-batches as were drawn: what is compared, the drawn number first."""
ALIKE = 0.03
"""Planned times that differ by less are alike: plans are no truer than that."""
_MOST_FORWARDS = 20_000
"""Micro-batches times stages of a round: of more, what is compared would take longer than it could bring."""
_EXTRAPOLATION = 0.9
"""The size of a micro-batch over the smallest one observed, down to which its cost counts as known."""


@dataclass(frozen=True, slots=True)
class Work:
    """The micro-batches of a round. shapes: by model, in their order."""

    shapes: Mapping[str, tuple[Shape, ...]]

    @property
    def counts(self) -> Counts:
        return tuple((model, len(own)) for model, own in self.shapes.items())

    @property
    def typical(self) -> Shape:
        """The median in size."""
        return one_of_each(shapes_of([self]))[1]

    def of(self, replicas: Sequence[Replica]) -> list[list[Shape]]:
        """By replica."""
        dealt = []
        for replica in replicas:
            own = self.shapes[replica.model]
            count = sum(other.model == replica.model for other in replicas)
            dealt.append([own[index] for index in replica_micro_batches(len(own), count, replica.index)])
        return dealt


def shapes_of(works: Iterable[Work]) -> list[Shape]:
    """Of all their micro-batches."""
    return [shape for work in works for own in work.shapes.values() for shape in own]


def soonest(
    works: Callable[[float], Sequence[Work]],
    profile: Profile,
    placement: Sequence[Replica],
    schedule: Callable[[Work], Schedule],
    *,
    least_tokens: int,
    gap_s: float,
) -> float:
    """Of `TIMES` the greatest by which the rounds of an update are planned to take about the least time.

    works: the rounds with so many times the micro-batches. schedule: of a round. least_tokens: of the micro-batches
    whose costs the profile knows. gap_s: between two operations of a rank.
    """
    drawn = TIMES[0]
    numbers = {times: works(times) for times in TIMES}
    seconds: dict[float, float] = {}
    tried: set[tuple[Counts, ...]] = set()
    for times, rounds in numbers.items():
        counts = tuple(one.counts for one in rounds)
        if counts in tried or any(_num_forwards(one, placement) > _MOST_FORWARDS for one in rounds):
            continue
        tried.add(counts)
        if times != drawn:
            if drawn not in seconds:
                break
            is_known = all(one.typical.size >= _EXTRAPOLATION * least_tokens for one in rounds)
            at_least_s = sum(_busiest_s(one, profile, placement, gap_s) for one in rounds)
            if not is_known or at_least_s > (1 + ALIKE) * min(seconds.values()):
                continue
        seconds[times] = sum(_round_s(one, profile, placement, schedule, gap_s) for one in rounds)
    least_s = min(seconds.values(), default=0.0)
    best = max((times for times, one in seconds.items() if one <= (1 + ALIKE) * least_s), default=drawn)
    _tell(numbers, seconds, best)
    return best


def _tell(numbers: Mapping[float, Sequence[Work]], seconds: Mapping[float, float], best: float) -> None:
    def said(times: float) -> str:
        return describe(max((one.counts for one in numbers[times]), key=str))

    drawn = TIMES[0]
    if best != drawn:
        _logger.info(
            "%s, dealt from %s: an update's steps are planned to take %.3f s in place of %.3f s, %.2f times as fast",
            *(said(best), said(drawn), seconds[best], seconds[drawn], seconds[drawn] / seconds[best]),
        )
        return
    compared = ", ".join(f"{said(times)} {one:.3f} s" for times, one in seconds.items())
    _logger.info(
        "%s, as they were drawn: more are planned to take over %.0f%% longer (%s)",
        *(said(drawn), 100 * ALIKE, compared or "too many to compare"),
    )


def _round_s(
    work: Work, profile: Profile, placement: Sequence[Replica], schedule: Callable[[Work], Schedule], gap_s: float
) -> float:
    replicas = replicas_of(placement, work.counts)
    names = [replica.name for replica in replicas]
    return planned_times(schedule(work), profile, names, work.of(replicas), gap_s=gap_s).makespan_s


def _busiest_s(work: Work, profile: Profile, placement: Sequence[Replica], gap_s: float) -> float:
    """Of the operations of the rank that has most, backwards whole: a schedule is hardly shorter."""
    replicas = replicas_of(placement, work.counts)
    by_rank: dict[int, float] = {}
    for replica, shapes in zip(replicas, work.of(replicas), strict=True):
        for stage, rank in enumerate(replica.ranks):
            lines = [CostLine.of(profile, replica.name, stage, kind) for kind in (Kind.F, Kind.B)]
            own = sum(line.seconds(shape) + gap_s for line in lines for shape in shapes)
            by_rank[rank] = by_rank.get(rank, 0.0) + own
    return max(by_rank.values())


def _num_forwards(work: Work, placement: Sequence[Replica]) -> int:
    replicas = replicas_of(placement, work.counts)
    return sum(len(replica.ranks) * len(own) for replica, own in zip(replicas, work.of(replicas), strict=True))


def median_gap_s(spans: Iterable[Span]) -> float:
    """Seconds between two operations of a rank, its waiting left out; 0 where no two follow one another.

    spans: rank after rank, in the order in which each recorded them.
    """
    gaps = []
    for before, after in itertools.pairwise(spans):
        if before.category == after.category == TRAIN:
            wait_s = after.arguments.get("wait_s", 0.0)
            assert isinstance(wait_s, float), f"{after.name} says wait_s={wait_s!r}"
            gaps.append(after.start_s - wait_s - before.end_s)
    return statistics.median([gap for gap in gaps if gap >= 0] or [0.0])
