"""A step against its plan: each cause of lost time is found where it was put in, and the causes add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.benchmarks.training.comparison import Comparison, compare
from fuse.intrastage.planned_times import PlannedTimes, evaluate_seconds, operation_name, times_of
from fuse.trace import Span
from schedules import Op, Pipeline, Problem, Schedule
from schedules.baselines import one_f_one_b
from schedules.random_problems import random_problem, random_schedule

PIPELINE = Pipeline(name="actor", ranks=(0, 1), num_micro_batches=3, forward_ticks=(10, 10), backward_ticks=(20, 20))
SCHEDULE = one_f_one_b(Problem(num_ranks=2, pipelines=(replace(PIPELINE, transfer_ticks=1),)))


def plan_of(schedule: Schedule) -> PlannedTimes:
    """A tick is a millisecond."""
    transfers = tuple(1e-3 * pipeline.transfer_ticks for pipeline in schedule.problem.pipelines)
    return times_of(schedule, durations(schedule), transfers)


def executed(
    schedule: Schedule, seconds: Mapping[Op, float], *, transfer_s: float, gap_s: float = 0.0, begin_s: float = 1e4
) -> list[list[Span]]:
    """What ranks would record if operations took `seconds` and the executor `gap_s` after each."""
    busy = {op: seconds[op] + gap_s for op in seconds}
    timing = evaluate_seconds(schedule, busy, [transfer_s] * len(schedule.problem.pipelines))
    ranks = []
    for rank, order in enumerate(schedule.ranks):
        spans, free_s = [], begin_s
        for index, op in enumerate(order):
            start_s = begin_s + 1e-6 * timing.start[rank][index]
            arguments = {"wait_s": start_s - free_s}
            spans.append(Span(operation_name(schedule.problem, op), "train", start_s, start_s + seconds[op], arguments))
            free_s = begin_s + 1e-6 * timing.end[rank][index]
        ranks.append([*spans, Span("step actor", "optimizer", free_s, free_s + 1.0)])
    return ranks


def durations(schedule: Schedule, factor: float = 1.0) -> dict[Op, float]:
    return {op: 1e-3 * factor * schedule.problem.ticks(op) for _, op in schedule.ops()}


def parts(comparison: Comparison) -> list[float]:
    return [comparison.contention_s, comparison.imbalance_s, comparison.overhead_s, comparison.transfer_s]


def test_a_step_that_went_as_planned_lost_nothing() -> None:
    comparison = compare(SCHEDULE, plan_of(SCHEDULE), executed(SCHEDULE, durations(SCHEDULE), transfer_s=1e-3))
    assert comparison.makespan_executed_s == pytest.approx(comparison.makespan_planned_s)
    assert comparison.bubble_executed == pytest.approx(comparison.bubble_planned)
    assert comparison.slowdown == pytest.approx(1)
    assert comparison.overhead_share == pytest.approx(0, abs=1e-6)
    assert parts(comparison) == pytest.approx([0, 0, 0, 0], abs=1e-5)


def test_slow_operations_are_contention() -> None:
    spans = executed(SCHEDULE, durations(SCHEDULE, 1.5), transfer_s=1e-3)
    comparison = compare(SCHEDULE, plan_of(SCHEDULE), spans)
    assert comparison.slowdown == pytest.approx(1.5)
    assert comparison.contention_s == pytest.approx(0.5 * comparison.makespan_planned_s)
    assert parts(comparison)[1:] == pytest.approx([0, 0, 0], abs=2.1e-3)  # a few messages did not become slower


def test_one_slow_operation_on_the_critical_path_is_imbalance() -> None:
    seconds = durations(SCHEDULE)
    seconds[SCHEDULE.ranks[0][0]] += 0.050
    comparison = compare(SCHEDULE, plan_of(SCHEDULE), executed(SCHEDULE, seconds, transfer_s=1e-3))
    share = 0.050 / (2 * 3 * 0.030)
    assert comparison.slowdown == pytest.approx(1 + share)
    assert comparison.contention_s == pytest.approx(share * comparison.makespan_planned_s)
    assert comparison.contention_s + comparison.imbalance_s == pytest.approx(0.050)


def test_late_messages_are_transfer() -> None:
    comparison = compare(SCHEDULE, plan_of(SCHEDULE), executed(SCHEDULE, durations(SCHEDULE), transfer_s=5e-3))
    lost_s = comparison.makespan_executed_s - comparison.makespan_planned_s
    assert lost_s >= 2 * 4e-3  # there and back at least
    assert parts(comparison) == pytest.approx([0, 0, 0, lost_s], abs=1e-5)
    # Of the three messages each way, the first forward, and all backwards, are waited for from when they are sent.
    assert comparison.transfer_share > 3 * 5e-3 / (2 * comparison.makespan_executed_s)


def test_time_between_operations_is_overhead() -> None:
    spans = executed(SCHEDULE, durations(SCHEDULE), transfer_s=1e-3, gap_s=2e-3)
    comparison = compare(SCHEDULE, plan_of(SCHEDULE), spans)
    assert comparison.overhead_share == pytest.approx(2 * 5 * 2e-3 / (2 * comparison.makespan_executed_s), rel=0.01)
    lost_s = comparison.makespan_executed_s - comparison.makespan_planned_s
    assert parts(comparison) == pytest.approx([0, 0, lost_s, 0], abs=2.1e-3)  # none after the last operation


@given(st.randoms(use_true_random=False))
def test_the_causes_add_up_whatever_happened(random: Random) -> None:
    schedule = random_schedule(random_problem(random), random)
    seconds = {op: one * random.uniform(0.5, 3) for op, one in durations(schedule).items()}
    spans = executed(schedule, seconds, transfer_s=random.uniform(0, 5e-3), gap_s=random.uniform(0, 1e-3))
    comparison = compare(schedule, plan_of(schedule), spans)
    lost_s = comparison.makespan_executed_s - comparison.makespan_planned_s
    assert sum(parts(comparison)) == pytest.approx(lost_s, abs=1e-5)
    assert comparison.overhead_s >= -1e-5
    assert -1e-3 <= comparison.bubble_executed < 1
    assert (
        comparison.overhead_share + comparison.transfer_share <= comparison.bubble_executed + 1e-3
    )  # microseconds are rounded
    assert min(comparison.overhead_share, comparison.transfer_share) >= 0


def test_spans_of_another_step_are_refused() -> None:
    spans = executed(SCHEDULE, durations(SCHEDULE), transfer_s=0.0)
    with pytest.raises(ValueError, match=r"rank 1 recorded 5 operations, starting \['B actor\.1\.0', .* spans of one"):
        compare(SCHEDULE, plan_of(SCHEDULE), [spans[0], spans[1][1:]])
    idle = Schedule(SCHEDULE.problem, ((), ()))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(idle, plan_of(idle), [[], []])
