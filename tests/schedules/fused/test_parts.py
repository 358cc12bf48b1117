"""Pipelines that share no ranks are problems of their own, and replicas of one form take one order."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from schedules import Pipeline, Problem, Schedule, evaluate, violations
from schedules.fused.greedy import greedy
from schedules.fused.parts import parts_of, schedule_in_parts
from schedules.random_problems import random_problem

from ...examples import examples


def side_by_side(*problems: Problem) -> Problem:
    """One problem of several, on ranks and with names of their own."""
    pipelines: list[Pipeline] = []
    first = 0
    for number, problem in enumerate(problems):
        before = len(pipelines)
        pipelines += [
            replace(
                one,
                name=f"{one.name}.{number}",
                ranks=tuple(first + rank for rank in one.ranks),
                before=None if one.before is None else before + one.before,
            )
            for one in problem.pipelines
        ]
        first += problem.num_ranks
    limits = [problem.memory_limit_bytes for problem in problems]
    return Problem(
        num_ranks=first,
        pipelines=tuple(pipelines),
        memory_limit_bytes=None if None in limits else tuple(one for own in limits for one in own or ()),
        initial_bytes=tuple(one for problem in problems for one in problem.initial_bytes),
    )


def pair(forward_ticks: int = 2, num_micro_batches: int = 4) -> Problem:
    """Two models in opposite directions on three ranks."""
    ranks = (0, 1, 2)
    return Problem(
        num_ranks=3,
        pipelines=tuple(
            Pipeline(
                name=name,
                ranks=ranks[::order],
                num_micro_batches=num_micro_batches,
                forward_ticks=(forward_ticks,) * 3,
                backward_ticks=(2 * forward_ticks,) * 3,
                activation_bytes=(forward_ticks,) * 3,
            )
            for name, order in (("actor", 1), ("critic", -1))
        ),
    )


def asked(problem: Problem) -> tuple[Schedule, list[tuple[Problem, float]]]:
    questions: list[tuple[Problem, float]] = []

    def search(part: Problem, share: float) -> Schedule:
        questions.append((part, share))
        return greedy(part)

    return schedule_in_parts(problem, search), questions


def test_a_problem_of_one_part_is_asked_for_as_it_is() -> None:
    schedule, questions = asked(pair())
    assert questions == [(pair(), 1.0)]
    assert schedule == greedy(pair())


def test_random_parts_are_scheduled_as_each_alone_would_be() -> None:
    random = Random(5)
    for _ in range(examples(20)):
        problems = [
            replace(random_problem(random, max_forward_only=2), memory_limit_bytes=None)
            for _ in range(random.randint(2, 3))
        ]
        whole = side_by_side(*problems)
        parts = parts_of(whole)
        assert sorted(number for part in parts for number in part.pipelines) == list(range(len(whole.pipelines)))
        assert all(not set(one.ranks) & set(other.ranks) for one in parts for other in parts if one is not other)
        schedule, _ = asked(whole)
        assert violations(schedule) == []
        assert evaluate(schedule).makespan == max(evaluate(greedy(part.problem)).makespan for part in parts)


def test_replicas_take_the_order_of_the_one_that_has_most_to_do() -> None:
    whole = side_by_side(pair(20), pair(23), pair(21))
    schedule, questions = asked(whole)
    slowest = [one.forward_ticks for question, _ in questions for one in question.pipelines]
    assert slowest == [(23,) * 3] * 2
    assert violations(schedule) == []
    assert evaluate(schedule).makespan == evaluate(greedy(pair(23))).makespan
    _, questions = asked(side_by_side(pair(num_micro_batches=4), pair(num_micro_batches=3)))
    assert [share for _, share in questions] == [0.5, 0.5], "these have other operations"


@pytest.mark.parametrize(("limit", "num_asked"), [(100, 1), (23, 2)])
def test_a_replica_with_less_memory_than_that_order_takes_has_its_own(limit: int, num_asked: int) -> None:
    tight = replace(pair(22), memory_limit_bytes=(limit * 2,) * 3)
    roomy = replace(pair(23), memory_limit_bytes=(1000,) * 3)
    schedule, questions = asked(side_by_side(tight, roomy))
    assert len(questions) == num_asked
    assert violations(schedule) == []
