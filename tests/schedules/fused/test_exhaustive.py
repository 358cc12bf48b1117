"""The enumeration finds optima that can be argued by hand."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules import Pipeline, Problem, evaluate, violations
from schedules.fused.exhaustive import optimum
from schedules.random_problems import random_problem, random_schedule

OPPOSITE = Problem(
    num_ranks=2,
    pipelines=tuple(
        Pipeline(
            name=name,
            ranks=ranks,
            num_micro_batches=1,
            forward_ticks=(1, 1),
            backward_ticks=(1, 1),
            activation_bytes=(1, 1),
        )
        for name, ranks in (("actor", (0, 1)), ("critic", (1, 0)))
    ),
)


def test_opposite_directions_fill_each_others_bubbles() -> None:
    # Each rank has 4 ticks of work. Down and up: a-F0 | c-F0, then c-F1 | a-F1, c-B1 | a-B1, a-B0 | c-B0: no bubble.
    best = evaluate(optimum(OPPOSITE))
    assert best.makespan == 4
    assert best.bubble_ratio == 0
    assert best.peak_bytes == (2, 2)


def test_a_limit_for_one_model_at_a_time_costs_time() -> None:
    # Room for one activation: a rank cannot start the critic before the actor's backward, so one follows the other:
    # the actor's last stage ends at 3, where the critic's first begins; its last stage waits for rank 0 until 4.
    best = optimum(replace(OPPOSITE, memory_limit_bytes=(1, 1)))
    assert violations(best) == []
    assert evaluate(best).makespan == 3 + 4


def test_too_many_operations_are_refused() -> None:
    pipeline = replace(OPPOSITE.pipelines[0], num_micro_batches=9)
    with pytest.raises(ValueError, match="36 operations are too many to enumerate"):
        optimum(replace(OPPOSITE, pipelines=(pipeline,)))


@given(st.integers(0, 10**6))
def test_no_random_schedule_beats_it(seed: int) -> None:
    random = Random(seed)
    problem = random_problem(
        random, max_ranks=2, max_pipelines=2, max_stages=2, max_micro_batches=2, max_ticks=5, max_forward_only=1
    )
    if sum(p.num_stages * p.num_micro_batches * (2 + p.can_split) for p in problem.pipelines) > 10:
        return
    best = optimum(problem)
    assert violations(best) == [] or {v.rule for v in violations(best)} == {"message order"}
    key = (evaluate(best).makespan, max(evaluate(best).peak_bytes))
    for _ in range(20):
        other = evaluate(random_schedule(problem, random))
        assert key <= (other.makespan, max(other.peak_bytes))
