"""Planned times: what was measured where it was, straight lines elsewhere, and the evaluator's order of events."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts, TransferCosts
from fuse.intrastage.planned_times import CostLine, planned_times
from schedules import Kind, Op, Pipeline, Problem, Schedule, evaluate
from schedules.random_problems import random_problem, random_schedule

SMALL, LARGE = Shape(1, 100), Shape(2, 150)


def costs(pipeline: str, stage: int, shape: Shape, ticks: tuple[int, int, int | None, int | None]) -> StageCosts:
    return StageCosts(
        pipeline=pipeline,
        stage=stage,
        shape=shape,
        forward_ticks=ticks[0],
        backward_ticks=ticks[1],
        input_grad_ticks=ticks[2],
        weight_grad_ticks=ticks[3],
        activation_bytes=0,
        weight_grad_bytes=0,
    )


PROFILE = Profile(
    tick_s=1e-3,
    stages=(
        costs("actor.0", 0, SMALL, (10, 20, 12, 8)),
        costs("actor.0", 0, LARGE, (40, 80, 48, 32)),
        costs("actor.0", 1, SMALL, (5, 15, None, None)),
    ),
    transfers=(TransferCosts(pipeline="actor.0", stage=0, shape=SMALL, ticks=2),),
)


@pytest.mark.parametrize(
    ("stage", "shape", "kind", "expected_ms"),
    [
        (0, SMALL, Kind.F, 10),
        (0, LARGE, Kind.I, 48),
        (0, Shape(4, 50), Kind.F, 25),  # 200 tokens are half way from 100 to 300
        (0, Shape(1, 400), Kind.B, 110),  # the line goes on
        (0, Shape(1, 50), Kind.W, 2),
        (0, Shape(1, 1), Kind.F, 1),  # a tick at least
        (1, Shape(1, 300), Kind.F, 15),  # one shape alone: in proportion
    ],
)
def test_costs_between_and_beyond_measured_shapes(stage: int, shape: Shape, kind: Kind, expected_ms: float) -> None:
    assert CostLine.of(PROFILE, "actor.0", stage, kind).seconds(shape) == pytest.approx(1e-3 * expected_ms)


def test_shapes_of_about_one_size_tell_no_slope() -> None:
    """Micro-batches dealt by length: 300 and 302 tokens, of which the larger happened to be faster."""
    near = costs("actor.0", 0, Shape(1, 302), (31, 1, 1, 1))
    alone = replace(PROFILE, stages=(*(one for one in PROFILE.stages if one.shape == LARGE and one.stage == 0), near))
    assert CostLine.of(alone, "actor.0", 0, Kind.F).seconds(Shape(1, 301)) == pytest.approx(0.0355)
    assert CostLine.of(alone, "actor.0", 0, Kind.F).seconds(Shape(2, 301)) == pytest.approx(0.071)


def test_shapes_of_equal_size_count_together_where_neither_is_the_one_asked_for() -> None:
    wide = costs("actor.0", 0, Shape(2, 50), (14, 1, 1, 1))
    profile = replace(PROFILE, stages=(*PROFILE.stages, wide))
    assert CostLine.of(profile, "actor.0", 0, Kind.F).seconds(Shape(2, 50)) == pytest.approx(0.014)
    assert CostLine.of(profile, "actor.0", 0, Kind.F).seconds(Shape(4, 25)) == pytest.approx(0.012)


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no stage 2 of pipeline actor\.0: measure it"):
        CostLine.of(PROFILE, "actor.0", 2, Kind.F).seconds(SMALL)
    with pytest.raises(ValueError, match=r"no I of stage 1 of actor\.0: build stages with split_backward"):
        CostLine.of(PROFILE, "actor.0", 1, Kind.I).seconds(SMALL)


def test_a_plan_by_hand() -> None:
    pipeline = Pipeline(name="a", ranks=(0, 1), num_micro_batches=2, forward_ticks=(1, 1), backward_ticks=(1, 1))
    orders = ("F0.0.0 F0.0.1 B0.0.0 B0.0.1", "F0.1.0 B0.1.0 F0.1.1 B0.1.1")
    ranks = tuple(tuple(map(Op.parse, order.split())) for order in orders)
    schedule = Schedule(Problem(num_ranks=2, pipelines=(pipeline,)), ranks)
    plan = planned_times(schedule, PROFILE, ["actor.0"], [[SMALL, LARGE]])
    milliseconds = [
        [(round(1e3 * start_s), round(1e3 * end_s)) for start_s, end_s in plan.of_rank(rank)] for rank in (0, 1)
    ]
    assert milliseconds == [
        [(0, 10), (10, 50), (50, 70), (114, 194)],
        [(12, 17), (17, 32), (52, 67), (67, 112)],
    ]
    assert plan.makespan_s == pytest.approx(0.194)
    assert plan.transfer_s == pytest.approx((0.002,))
    assert plan.bubble_ratio == pytest.approx(1 - (150 + 80) / (2 * 194))


@given(st.randoms(use_true_random=False))
def test_a_profile_of_the_problem_itself_plans_as_the_evaluator_times(random: Random) -> None:
    problem = random_problem(random)
    schedule = random_schedule(problem, random)
    profile = Profile(
        tick_s=1e-3,
        stages=tuple(
            costs(
                pipeline.name,
                stage,
                SMALL,
                (
                    pipeline.forward_ticks[stage],
                    pipeline.backward_ticks[stage],
                    pipeline.input_grad_ticks[stage] if pipeline.input_grad_ticks else None,
                    pipeline.weight_grad_ticks[stage] if pipeline.weight_grad_ticks else None,
                ),
            )
            for pipeline in problem.pipelines
            for stage in range(pipeline.num_stages)
        ),
        transfers=tuple(
            TransferCosts(pipeline=pipeline.name, stage=0, shape=SMALL, ticks=pipeline.transfer_ticks)
            for pipeline in problem.pipelines
        ),
    )
    names = [pipeline.name for pipeline in problem.pipelines]
    plan = planned_times(schedule, profile, names, [[SMALL] * one.num_micro_batches for one in problem.pipelines])
    timing = evaluate(schedule)
    for planned, timed in ((plan.start_s, timing.start), (plan.end_s, timing.end)):
        for of_rank, ticks in zip(planned, timed, strict=True):
            assert of_rank == pytest.approx([1e-3 * time for time in ticks])
    assert plan.bubble_ratio == pytest.approx(timing.bubble_ratio)
