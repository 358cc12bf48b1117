"""The constraint program equals enumeration on tiny problems, and proves what does not exist."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from schedules import Pipeline, Problem, evaluate, violations
from schedules.fused.cpsat import Outcome, lowest_peak, shortest
from schedules.fused.exhaustive import optimum
from schedules.fused.greedy import greedy
from schedules.fused.halves import halves_lose_nothing
from schedules.random_problems import random_problem

OPPOSITE = Problem(
    num_ranks=2,
    pipelines=tuple(
        Pipeline(
            name=name,
            ranks=ranks,
            num_micro_batches=2,
            forward_ticks=(1, 1),
            backward_ticks=(2, 2),
            activation_bytes=(1, 1),
        )
        for name, ranks in (("actor", (0, 1)), ("critic", (1, 0)))
    ),
)


def _tiny_problems(count: int) -> list[Problem]:
    """Problems that enumeration can do, in which each rank has a stage of a pipeline at most once."""
    random, found = Random(5), []
    while len(found) < count:
        problem = random_problem(random, max_ranks=2, max_pipelines=2, max_stages=2, max_micro_batches=2, max_ticks=5)
        small = sum(p.num_stages * p.num_micro_batches * (2 + p.can_split) for p in problem.pipelines) <= 10
        if small and all(len(set(p.ranks)) == p.num_stages for p in problem.pipelines):
            found.append(problem)
    return found


def test_equals_enumeration() -> None:
    for problem in _tiny_problems(12):
        unsplit = replace(
            problem,
            pipelines=tuple(replace(p, input_grad_ticks=None, weight_grad_ticks=None) for p in problem.pipelines),
        )
        best = evaluate(optimum(unsplit))
        start = greedy(unsplit)
        result = shortest(unsplit, split=False, makespan=evaluate(start).makespan, hint=start, time_limit_s=120)
        assert (result.outcome, result.value, result.bound) == (Outcome.OPTIMAL, best.makespan, best.makespan)
        assert result.schedule is not None
        assert violations(result.schedule) == []
        assert evaluate(result.schedule).makespan == best.makespan

        peak = max(best.peak_bytes)
        least = lowest_peak(unsplit, split=False, makespan=best.makespan, below_bytes=peak + 1, time_limit_s=120)
        assert (least.outcome, least.value) == (Outcome.OPTIMAL, peak)
        below = lowest_peak(unsplit, split=False, makespan=best.makespan, below_bytes=peak, time_limit_s=120)
        assert below.outcome is Outcome.INFEASIBLE


def test_split_backwards_equal_enumeration_where_halves_lose_nothing() -> None:
    pipelines = tuple(
        replace(p, num_micro_batches=1, input_grad_ticks=(1, 1), weight_grad_ticks=(1, 1), weight_grad_bytes=(1, 1))
        for p in OPPOSITE.pipelines
    )
    problem = replace(OPPOSITE, pipelines=pipelines)
    assert halves_lose_nothing(problem)
    best = evaluate(optimum(problem))
    result = shortest(problem, split=True, makespan=best.makespan + 3, time_limit_s=120)
    assert (result.outcome, result.value) == (Outcome.OPTIMAL, best.makespan)


def test_limits_of_the_problem_hold() -> None:
    limited = replace(OPPOSITE, memory_limit_bytes=(1, 1))
    result = shortest(limited, split=False, makespan=30, time_limit_s=120)
    assert result.schedule is not None
    assert violations(result.schedule) == []
    # One activation per rank: four micro-batches, each F F B B through both ranks, follow one another; where a rank is
    # free before the next needs it, they overlap.
    assert result.value == evaluate(optimum(limited)).makespan


def test_a_channel_that_virtual_stages_share_keeps_its_order() -> None:
    pipeline = Pipeline(
        name="virtual",
        ranks=(0, 1, 0, 1),
        num_micro_batches=2,
        forward_ticks=(1, 2, 1, 2),
        backward_ticks=(2, 1, 2, 1),
        transfer_ticks=1,
    )
    result = shortest(Problem(num_ranks=2, pipelines=(pipeline,)), split=False, makespan=60, time_limit_s=120)
    assert result.outcome is Outcome.OPTIMAL
    assert result.schedule is not None
    assert violations(result.schedule) == []


def test_a_makespan_below_the_optimum_is_infeasible() -> None:
    best = evaluate(optimum(OPPOSITE)).makespan
    assert shortest(OPPOSITE, split=False, makespan=best, time_limit_s=120).outcome is Outcome.OPTIMAL
    assert shortest(OPPOSITE, split=False, makespan=best - 1, time_limit_s=120).outcome is Outcome.INFEASIBLE


def test_stops_when_asked() -> None:
    pipelines = tuple(
        Pipeline(
            name=name,
            ranks=ranks,
            num_micro_batches=32,
            forward_ticks=(1,) * 4,
            backward_ticks=(2,) * 4,
            activation_bytes=(1,) * 4,
        )
        for name, ranks in (("actor", (0, 1, 2, 3)), ("critic", (3, 2, 1, 0)))
    )
    problem = Problem(num_ranks=4, pipelines=pipelines, memory_limit_bytes=(4,) * 4)
    result = shortest(problem, split=False, makespan=1000, time_limit_s=1e6, should_stop=lambda: True)
    assert result.outcome in (Outcome.UNKNOWN, Outcome.FOUND)  # days before the limit: it was stopped


@pytest.mark.parametrize("below", [0, 1])
def test_a_cap_below_one_micro_batch_is_infeasible(below: int) -> None:
    assert lowest_peak(OPPOSITE, split=False, makespan=99, below_bytes=below, time_limit_s=120).outcome == "infeasible"
