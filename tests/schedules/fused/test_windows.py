"""A window solved again makes a schedule shorter or leaner, as far as the rest allows, and never worse."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from schedules import Kind, Op, Pipeline, Problem, Schedule, evaluate, violations
from schedules.fused.windows import Window, lower_peak, peak_ticks, shorten, window_at
from schedules.random_problems import random_problem, random_schedule

from ...examples import examples


def _pipeline(name: str, ranks: tuple[int, ...], num_micro_batches: int = 1) -> Pipeline:
    stages = len(ranks)
    return Pipeline(
        name=name,
        ranks=ranks,
        num_micro_batches=num_micro_batches,
        forward_ticks=(1,) * stages,
        backward_ticks=(2,) * stages,
        activation_bytes=(1,) * stages,
    )


# Rank 0 runs the short model b first, and a, which must go through both ranks, only then.
SHORT_FIRST = Schedule(
    Problem(num_ranks=2, pipelines=(_pipeline("a", (0, 1)), _pipeline("b", (0,)))),
    (
        (Op(1, 0, 0, Kind.F), Op(1, 0, 0, Kind.B), Op(0, 0, 0, Kind.F), Op(0, 0, 0, Kind.B)),
        (Op(0, 1, 0, Kind.F), Op(0, 1, 0, Kind.B)),
    ),
)


@pytest.mark.parametrize(
    ("window", "makespan"),
    [
        # a alone takes 1 + 1 + 2 + 2 = 6, and b's three ticks fit in while a is on rank 1.
        (Window(0, 9), 6),
        # The forward of b stays at 0, so a starts at 1; the backward of b fits in as before.
        (Window(1, 9), 7),
        # Only the backward of a on rank 0, which has to wait for rank 1 and starts at 7, is free: nothing is gained.
        (Window(7, 9), 9),
        (Window(20, 30), 9),
    ],
)
def test_shortens_as_far_as_the_rest_allows(window: Window, makespan: int) -> None:
    assert evaluate(SHORT_FIRST).makespan == 9
    found = shorten(SHORT_FIRST, window, time_limit_s=120)
    assert violations(found) == []
    assert evaluate(found).makespan == makespan
    assert shorten(SHORT_FIRST, window, time_limit_s=120) == found


def test_lowers_the_peak_at_the_same_makespan() -> None:
    # F0 F1 F2 B0 B1 B2 on one rank holds three activations; F0 B0 F1 B1 F2 B2 takes as long and holds one. While F0
    # stands still before the window, one is held at entry and given back inside.
    problem = Problem(num_ranks=1, pipelines=(_pipeline("m", (0,), 3),))
    order = tuple(Op(0, 0, micro_batch, kind) for kind in (Kind.F, Kind.B) for micro_batch in range(3))
    schedule = Schedule(problem, (order,))
    for begin in (0, 1):
        found = lower_peak(schedule, Window(begin, 9), time_limit_s=120)
        assert violations(found) == []
        timing = evaluate(found)
        assert (timing.makespan, timing.peak_bytes) == (9, (1,))
    # With F0 and F1 fixed, two are held whatever follows.
    assert evaluate(lower_peak(schedule, Window(2, 9), time_limit_s=120)).peak_bytes == (2,)


def test_windows_lie_around_the_peak() -> None:
    problem = Problem(num_ranks=1, pipelines=(_pipeline("m", (0,), 3),))
    order = tuple(Op(0, 0, micro_batch, kind) for kind in (Kind.F, Kind.B) for micro_batch in range(3))
    schedule = Schedule(problem, (order,))
    assert peak_ticks(schedule) == [2]
    assert window_at(schedule, 2, 2) == Window(1, 3)
    assert window_at(schedule, 0, 2) == Window(0, 2)
    assert window_at(schedule, 8, 100) == Window(0, 8)


def test_never_worse_and_always_legal() -> None:
    random = Random(4)
    for _ in range(examples(30)):
        problem = random_problem(random, max_forward_only=2)
        schedule = random_schedule(problem, random)
        peaks = evaluate(schedule).peak_bytes
        if random.random() < 0.5:
            schedule = replace(schedule, problem=replace(problem, memory_limit_bytes=peaks))
        timing = evaluate(schedule)
        window = window_at(schedule, random.randrange(timing.makespan), random.randint(1, 30))
        for improve in (shorten, lower_peak):
            found = improve(schedule, window, time_limit_s=0.3, seed=random.randrange(99))
            assert violations(found) == []
            new = evaluate(found)
            assert (new.makespan, max(new.peak_bytes)) <= (timing.makespan, max(timing.peak_bytes))
