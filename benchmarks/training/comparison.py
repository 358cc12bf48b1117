"""What became of a plan: an executed step against its planned one, and where the difference went."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuse.intrastage.planned_times import PlannedTimes, evaluate_seconds, operation_name
from fuse.trace import Span
from schedules import Op, Problem, Schedule
from schedules.walk import needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One step, planned and executed. Shares are of all ranks' time from the first start to the last end.

    bubble_planned, bubble_executed: share without an operation running.
    slowdown: seconds that operations took, over those planned for them.
    overhead_share: spent by the executor itself, neither computing nor waiting.
    transfer_share: spent waiting for a message whose sender had finished making it.

    Four parts add up to `makespan_executed_s - makespan_planned_s`; each may be negative:
    contention_s: all operations took `slowdown` times their plan. imbalance_s: some of them more than others.
    overhead_s: the executor's own work. transfer_s: messages took longer than planned, and ranks began apart.
    """

    makespan_planned_s: float
    makespan_executed_s: float
    bubble_planned: float
    bubble_executed: float
    slowdown: float
    overhead_share: float
    transfer_share: float
    contention_s: float
    imbalance_s: float
    overhead_s: float
    transfer_s: float


def compare(schedule: Schedule, planned: PlannedTimes, spans: Sequence[Sequence[Span]]) -> Comparison:
    """Compare a step's plan with what its ranks recorded.

    spans: by rank, those of the step; only category "train" counts. Clocks of the ranks must agree.

    Raises:
        ValueError: the spans are not those of this schedule, or it has no operations.
    """
    recorded = [
        _matched(schedule, rank, [span for span in of_rank if span.category == "train"])
        for rank, of_rank in enumerate(spans)
    ]
    if not any(recorded):
        raise ValueError("the schedule has no operations: there is nothing to compare")
    taken_s = {op: span.duration_s for of_rank in recorded for op, span in of_rank}
    gaps_s = {op: gap_s for of_rank in recorded for op, gap_s in _gaps(of_rank)}
    begin_s = min(of_rank[0][1].start_s for of_rank in recorded if of_rank)
    executed_s = max(of_rank[-1][1].end_s for of_rank in recorded if of_rank) - begin_s
    total_s = executed_s * schedule.problem.num_ranks
    planned_s = sum(sum(ends) - sum(starts) for starts, ends in zip(planned.start_s, planned.end_s, strict=True))
    slowdown = sum(taken_s.values()) / planned_s

    def makespan_s(with_gaps: bool) -> float:
        seconds = {op: one + gaps_s[op] if with_gaps else one for op, one in taken_s.items()}
        return 1e-6 * evaluate_seconds(schedule, seconds, planned.transfer_s).makespan

    as_slow_s = planned.makespan_s * slowdown
    as_taken_s, with_overhead_s = makespan_s(with_gaps=False), makespan_s(with_gaps=True)
    return Comparison(
        makespan_planned_s=planned.makespan_s,
        makespan_executed_s=executed_s,
        bubble_planned=planned.bubble_ratio,
        bubble_executed=1 - sum(taken_s.values()) / total_s,
        slowdown=slowdown,
        overhead_share=sum(gaps_s.values()) / total_s,
        transfer_share=_late_s(schedule.problem, dict(itertools.chain.from_iterable(recorded))) / total_s,
        contention_s=as_slow_s - planned.makespan_s,
        imbalance_s=as_taken_s - as_slow_s,
        overhead_s=with_overhead_s - as_taken_s,
        transfer_s=executed_s - with_overhead_s,
    )


def _matched(schedule: Schedule, rank: int, spans: Sequence[Span]) -> list[tuple[Op, Span]]:
    names = [span.name for span in spans]
    expected = [operation_name(schedule.problem, op) for op in schedule.ranks[rank]]
    if names != expected:
        raise ValueError(
            f"rank {rank} recorded {len(names)} operations, starting {names[:3]}, where the schedule has "
            f"{len(expected)}, starting {expected[:3]}: compare the spans of one step with the schedule it ran"
        )
    return list(zip(schedule.ranks[rank], spans, strict=True))


def _gaps(of_rank: Sequence[tuple[Op, Span]]) -> list[tuple[Op, float]]:
    """After each operation, the seconds until its rank ran the next one or began to wait for it."""
    gaps = [
        (op, max(0.0, following.start_s - _wait_s(following) - span.end_s))
        for (op, span), (_, following) in itertools.pairwise(of_rank)
    ]
    return [*gaps, *((op, 0.0) for op, _ in of_rank[-1:])]


def _late_s(problem: Problem, recorded: Mapping[Op, Span]) -> float:
    """Seconds that ranks waited for messages after these were made."""
    late_s = 0.0
    for op, span in recorded.items():
        for source in needs(recorded, op, problem):
            if problem.rank_of(source) != problem.rank_of(op):
                late_s += max(0.0, min(_wait_s(span), span.start_s - recorded[source].end_s))
    return late_s


def _wait_s(span: Span) -> float:
    wait_s = span.arguments["wait_s"]
    assert isinstance(wait_s, float)
    return wait_s
