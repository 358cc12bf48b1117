"""Operations take as long as what others do meanwhile makes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuse.benchmarks.training.contention import contended_times
from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.planned_times import PlannedTimes, planned_times
from schedules import Op, Pipeline, Problem, Schedule
from schedules.baselines import serial
from schedules.instances import actor_and_critic

SHAPE = Shape(1, 8)


def profile(ticks: dict[str, list[int]], slower: int = 1) -> Profile:
    """Forwards of each stage take so many milliseconds, backwards twice as many."""
    return Profile(
        tick_s=1e-3,
        stages=tuple(
            StageCosts(
                pipeline=name,
                stage=stage,
                shape=SHAPE,
                forward_ticks=slower * one,
                backward_ticks=2 * slower * one,
                input_grad_ticks=None,
                weight_grad_ticks=None,
                activation_bytes=0,
                weight_grad_bytes=0,
            )
            for name, of_stages in ticks.items()
            for stage, one in enumerate(of_stages)
        ),
        transfers=(),
    )


def ends_of(times: PlannedTimes) -> list[float]:
    """Of all operations, rank after rank."""
    return [end_s for ends in times.end_s for end_s in ends]


def test_side_by_side_operations_are_slow_until_one_is_done() -> None:
    """Alone 200 and 100 ms, at half the pace together: the second is done after 200, the first has 100 left then."""
    pipelines = tuple(
        Pipeline(name=name, ranks=(rank,), num_micro_batches=1, forward_ticks=(1,), backward_ticks=(1,))
        for rank, name in enumerate("ab")
    )
    forwards = Schedule(Problem(num_ranks=2, pipelines=pipelines), ((Op.parse("F0.0.0"),), (Op.parse("F1.0.0"),)))
    ticks = {"a.0": [200], "b.0": [100]}
    times = contended_times(forwards, profile(ticks, 2), profile(ticks), ["a.0", "b.0"], [[SHAPE], [SHAPE]])
    assert ends_of(times) == pytest.approx([0.3, 0.2])


def test_what_waits_for_one_another_is_as_fast_as_alone() -> None:
    pipeline = Pipeline(name="a", ranks=(0, 1), num_micro_batches=1, forward_ticks=(1, 1), backward_ticks=(1, 1))
    problem = Problem(num_ranks=2, pipelines=(pipeline,))
    ticks = {"a.0": [30, 50]}
    schedule = serial(problem)
    alone = profile(ticks)
    times = contended_times(schedule, profile(ticks, 3), alone, ["a.0"], [[SHAPE]])
    expected = planned_times(schedule, alone, ["a.0"], [[SHAPE]])
    assert ends_of(times) == pytest.approx(ends_of(expected), abs=1e-5)


def test_bubbles_make_serial_steps_faster_than_operations_that_all_contend() -> None:
    """Two ranks, one of which always computes: all that is done in the other's bubbles takes two thirds of the time."""
    problem = actor_and_critic(
        actor_stages=2,
        critic_stages=2,
        actor_microbatches=4,
        critic_microbatches=4,
        actor_forward=30,
        critic_forward=30,
    ).problem
    problem = replace(problem, pipelines=tuple(replace(one, num_micro_batches=4) for one in problem.pipelines))
    schedule = serial(problem)
    ticks = {"actor.0": [30, 30], "critic.0": [30, 30]}
    names, shapes = ["actor.0", "critic.0"], [[SHAPE] * 4] * 2
    alone, together = profile(ticks, 2), profile(ticks, 3)
    slow = planned_times(schedule, together, names, shapes)
    found = contended_times(schedule, together, alone, names, shapes)
    expected_s = slow.makespan_s * (1 - 2 * slow.bubble_ratio * (1 - 2 / 3))
    assert found.makespan_s == pytest.approx(expected_s, rel=0.02)
    assert found.makespan_s < 0.95 * slow.makespan_s
    same = contended_times(schedule, together, together, names, shapes)
    assert ends_of(same) == pytest.approx(ends_of(slow))
