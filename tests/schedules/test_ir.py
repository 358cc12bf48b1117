"""The representation refuses what has no meaning, in one line that says what is wrong."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from schedules import Kind, Op, Pipeline, Problem, Schedule

ACTOR = Pipeline(name="actor", ranks=(0, 1), num_micro_batches=2, forward_ticks=(1, 2), backward_ticks=(2, 4))
PROBLEM = Problem(num_ranks=2, pipelines=(ACTOR,))


def test_an_operation_prints_and_parses() -> None:
    op = Op(1, 12, 3, Kind.W)
    assert str(op) == "W1.12.3"
    assert Op.parse("W1.12.3") == op


@pytest.mark.parametrize("text", ["", "F", "F0.1", "X0.1.2", "F0.1.2 ", "F-1.0.0"])
def test_another_form_of_operation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not of the form"):
        Op.parse(text)


def test_memory_defaults_to_nothing_held() -> None:
    assert ACTOR.activation_bytes == (0, 0)
    assert PROBLEM.initial_bytes == (0, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "the actor"}, "name 'the actor'"),
        ({"ranks": ()}, "ranks is empty"),
        ({"ranks": (0, -1)}, "ranks holds -1"),
        ({"ranks": [0, 1]}, "must be a tuple"),
        ({"num_micro_batches": 0}, "num_micro_batches holds 0"),
        ({"forward_ticks": (1,)}, "forward_ticks has 1 entries for 2"),
        ({"forward_ticks": (1, 1.5)}, "holds 1.5; scale it to an integer"),
        ({"forward_ticks": (1, True)}, "holds True"),
        ({"backward_ticks": (0, 1)}, "backward_ticks holds 0; the least is 1"),
        ({"input_grad_ticks": (1, 1)}, "must be given together"),
        ({"activation_bytes": (1, -1)}, "activation_bytes holds -1"),
        ({"transfer_ticks": -1}, "transfer_ticks holds -1"),
    ],
)
def test_a_pipeline_refuses(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        replace(ACTOR, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_ranks": 1, "initial_bytes": ()}, "rank 1 is outside 0..0"),
        ({"pipelines": ()}, "pipelines is empty"),
        ({"pipelines": (ACTOR, ACTOR)}, "two pipelines are named 'actor'"),
        ({"memory_limit_bytes": (1,)}, "memory_limit_bytes has 1 entries for 2"),
        (
            {"memory_limit_bytes": (5, 5), "initial_bytes": (0, 6)},
            "rank 1: initial_bytes 6 exceed",
        ),
    ],
)
def test_a_problem_refuses(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        replace(PROBLEM, **change)


def test_a_schedule_needs_one_order_per_rank() -> None:
    with pytest.raises(ValueError, match="1 rank orders for 2 ranks"):
        Schedule(PROBLEM, ((),))


def test_a_schedule_takes_its_hash_once_and_anew_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(PROBLEM, ((Op(0, 0, 0, Kind.F),), ()))
    here = hash(schedule)
    sent = pickle.loads(pickle.dumps(schedule))  # noqa: S301
    monkeypatch.setattr(Op, "__hash__", lambda op: 7)  # texts have other hashes elsewhere
    assert hash(schedule) == here
    assert hash(sent) != here
    assert sent == schedule
