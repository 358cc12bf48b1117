"""Text and JSON forms: what is read equals what was written, and anything else is refused."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules import Kind, Op, Pipeline, Problem, Schedule
from schedules.formats import (
    problem_from_json,
    problem_from_text,
    problem_to_json,
    problem_to_text,
    schedule_from_json,
    schedule_from_text,
    schedule_to_json,
    schedule_to_text,
)
from schedules.random_problems import random_problem, random_schedule

TEXT = """\
schedule 1
num_ranks 2
memory_limit_bytes 10 10
initial_bytes 0 3
pipeline actor
ranks 0 1
num_micro_batches 1
forward_ticks 1 2
backward_ticks 2 4
activation_bytes 5 5
weight_grad_bytes 0 0
transfer_ticks 1
rank 0: F0.0.0 B0.0.0
rank 1: F0.1.0 B0.1.0
"""


@given(st.randoms(use_true_random=False))
def test_round_trips_are_exact(random: Random) -> None:
    problem = random_problem(random, max_forward_only=2)
    schedule = random_schedule(problem, random)
    assert problem_from_text(problem_to_text(problem)) == problem
    assert problem_from_json(json.loads(json.dumps(problem_to_json(problem)))) == problem
    assert schedule_from_text(schedule_to_text(schedule)) == schedule
    assert schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule)))) == schedule
    assert schedule_to_text(schedule_from_text(schedule_to_text(schedule))) == schedule_to_text(schedule)


def test_the_text_form_is_stable() -> None:
    actor = Pipeline(
        name="actor",
        ranks=(0, 1),
        num_micro_batches=1,
        forward_ticks=(1, 2),
        backward_ticks=(2, 4),
        activation_bytes=(5, 5),
        transfer_ticks=1,
    )
    problem = Problem(num_ranks=2, pipelines=(actor,), memory_limit_bytes=(10, 10), initial_bytes=(0, 3))
    orders = tuple((Op(0, stage, 0, Kind.F), Op(0, stage, 0, Kind.B)) for stage in range(2))
    assert schedule_to_text(Schedule(problem, orders)) == TEXT
    assert schedule_from_text(TEXT) == Schedule(problem, orders)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("schedule 1", "schedule 3", "version is 3"),
        ("schedule 1\n", "", "version is None"),
        ("num_ranks 2\n", "", "'num_ranks' is absent"),
        ("num_ranks 2", "num_ranks two", "line 2: expected integers, found 'two'"),
        ("num_ranks 2", "num_ranks 2 2", "line 2: expected one integer, found 2"),
        ("ranks 0 1\n", "", "'ranks' is absent"),
        ("transfer_ticks 1", "transfer_tick 1", "unknown field 'transfer_tick'"),
        ("transfer_ticks 1", "transfer_ticks 1\ntransfer_ticks 1", "line 13: 'transfer_ticks 1' does not belong here"),
        ("rank 1:", "rank 2:", "line 14: expected 'rank 1:'"),
        ("F0.0.0", "Q0.0.0", "'Q0.0.0' is not of the form"),
        ("rank 1: F0.1.0 B0.1.0\n", "", "1 rank orders for 2 ranks"),
    ],
)
def test_a_damaged_text_is_refused(old: str, new: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        schedule_from_text(TEXT.replace(old, new, 1))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "expected an object, not list"),
        ({}, "version is None"),
        ({"problem": 1, "num_ranks": 1, "pipelines": {}}, "pipelines must be a list"),
        ({"problem": 1, "num_ranks": 1, "pipelines": [3]}, "expected an object, not int"),
        ({"problem": 1, "num_ranks": 1, "pipelines": [], "ranks": 3}, "unknown field 'ranks'"),
        ({"problem": 1, "num_ranks": 1.0, "pipelines": []}, "num_ranks holds 1.0"),
    ],
)
def test_a_damaged_object_is_refused(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        problem_from_json(value)


def test_a_problem_text_holds_no_orders() -> None:
    with pytest.raises(ValueError, match="rank orders belong to a schedule"):
        problem_from_text(TEXT.replace("schedule 1", "problem 1"))
