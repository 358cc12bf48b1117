"""What ranks get of a schedule: their own steps, unpacked once, of legal ones alone."""

from __future__ import annotations

import pickle

import pytest

from fuse.intrastage.message_order import steps_of
from fuse.intrastage.program import program_of
from schedules import Pipeline, Problem, Schedule
from schedules.fused.greedy import greedy

PIPELINES = tuple(
    Pipeline(name=name, ranks=ranks, num_micro_batches=3, forward_ticks=(1, 1), backward_ticks=(2, 2))
    for name, ranks in (("actor", (0, 1)), ("critic", (1, 0)))
)
SCHEDULE = greedy(Problem(num_ranks=2, pipelines=PIPELINES))


def test_ranks_unpack_their_own_steps_once_however_often_they_come() -> None:
    first, second = (pickle.loads(pickle.dumps(program_of(SCHEDULE))) for _ in range(2))  # noqa: S301
    for rank, steps in enumerate(steps_of(SCHEDULE)):
        assert first.steps(rank) == steps
        assert first.steps(rank) is second.steps(rank)
    assert program_of(SCHEDULE) is program_of(Schedule(SCHEDULE.problem, SCHEDULE.ranks))


def test_a_program_tells_its_schedule() -> None:
    assert program_of(SCHEDULE).schedule() == SCHEDULE


def test_no_program_is_made_of_an_illegal_schedule() -> None:
    with pytest.raises(ValueError, match="illegal schedule"):
        program_of(Schedule(SCHEDULE.problem, SCHEDULE.ranks[::-1]))
    with pytest.raises(ValueError, match="illegal schedule"):
        program_of(Schedule(SCHEDULE.problem, (SCHEDULE.ranks[0][:-1], SCHEDULE.ranks[1])))
