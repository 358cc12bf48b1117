"""Greedy schedules are legal for every problem that has a schedule, however tight its memory."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules import Pipeline, Problem, evaluate, violations
from schedules.bounds import smallest_limits
from schedules.fused.greedy import greedy
from schedules.random_problems import random_problem


@given(st.randoms(use_true_random=False))
def test_legal_with_any_limit_that_is_enough(random: Random) -> None:
    problem = random_problem(random, max_forward_only=2)
    assert violations(greedy(problem)) == []
    limits = tuple(limit + random.randint(0, 9) for limit in smallest_limits(problem))
    assert violations(greedy(replace(problem, memory_limit_bytes=limits))) == []


def test_models_that_would_block_one_another_are_admitted_one_by_one() -> None:
    # Room for one activation per rank: if both models started, each would hold what the other's second stage needs.
    pipelines = tuple(
        Pipeline(
            name=name,
            ranks=ranks,
            num_micro_batches=2,
            forward_ticks=(1, 1),
            backward_ticks=(1, 1),
            activation_bytes=(1, 1),
        )
        for name, ranks in (("actor", (0, 1)), ("critic", (1, 0)))
    )
    schedule = greedy(Problem(num_ranks=2, pipelines=pipelines, memory_limit_bytes=(1, 1)))
    assert violations(schedule) == []
    assert evaluate(schedule).peak_bytes == (1, 1)


def test_too_small_a_limit_is_refused() -> None:
    pipeline = Pipeline(
        name="model", ranks=(0,), num_micro_batches=1, forward_ticks=(1,), backward_ticks=(1,), activation_bytes=(5,)
    )
    with pytest.raises(ValueError, match="rank 0: limit of 4 bytes is too small for one micro-batch; it needs 5"):
        greedy(Problem(num_ranks=1, pipelines=(pipeline,), memory_limit_bytes=(4,)))
