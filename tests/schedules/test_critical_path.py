"""The critical path explains the makespan, operation by operation."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from schedules import Op, Pipeline, Problem, Schedule, evaluate
from schedules.baselines import one_f_one_b
from schedules.critical_path import critical_path
from schedules.random_problems import random_problem, random_schedule

from ..examples import examples

PIPELINE = Pipeline(name="actor", ranks=(0, 1), num_micro_batches=2, forward_ticks=(1, 1), backward_ticks=(2, 2))


def test_of_a_pipeline_whose_last_stage_is_never_idle() -> None:
    # F0 on rank 0, then all of rank 1, then the last backward of rank 0.
    path = critical_path(one_f_one_b(Problem(num_ranks=2, pipelines=(PIPELINE,))))
    assert list(map(str, path)) == ["F0.0.0", "F0.1.0", "B0.1.0", "F0.1.1", "B0.1.1", "B0.0.1"]


def test_goes_through_the_rank_that_holds_the_others_up() -> None:
    slow = replace(PIPELINE, forward_ticks=(9, 1), transfer_ticks=3)
    path = critical_path(one_f_one_b(Problem(num_ranks=2, pipelines=(slow,))))
    # Rank 0 forwards twice without a pause; the second micro-batch then goes there and back.
    assert list(map(str, path)) == ["F0.0.0", "F0.0.1", "F0.1.1", "B0.1.1", "B0.0.1"]


@pytest.mark.parametrize("seed", range(examples(40)))
def test_is_the_makespan_without_a_gap(seed: int) -> None:
    random = Random(seed)
    schedule = random_schedule(random_problem(random, max_forward_only=2), random)
    timing = evaluate(schedule)
    times = {
        op: (start, end)
        for order, starts, ends in zip(schedule.ranks, timing.start, timing.end, strict=True)
        for op, start, end in zip(order, starts, ends, strict=True)
    }
    path = critical_path(schedule)
    assert times[path[0]][0] == 0
    assert times[path[-1]][1] == timing.makespan
    for before, after in pairwise(path):
        assert times[after][0] - times[before][1] in (0, schedule.problem.transfer_ticks(before, after))


def test_with_times_that_were_recorded_it_goes_by_what_came_last() -> None:
    schedule = one_f_one_b(Problem(num_ranks=2, pipelines=(replace(PIPELINE, num_micro_batches=1),)))
    planned = evaluate(schedule)
    late = replace(planned, start=((0, 9), (2, 4)), end=((1, 11), (3, 8)), makespan=11)
    assert list(map(str, critical_path(schedule, late))) == ["F0.0.0", "F0.1.0", "B0.1.0", "B0.0.0"]


def test_of_nothing_is_nothing() -> None:
    assert critical_path(Schedule(Problem(num_ranks=2, pipelines=(PIPELINE,)), ((), ()))) == ()
    assert critical_path(Schedule(Problem(num_ranks=2, pipelines=(PIPELINE,)), ((Op.parse("F0.0.0"),), ()))) != ()
