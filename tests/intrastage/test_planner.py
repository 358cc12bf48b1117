"""The planner measures once, plans every count of micro-batches, keeps both on disk, and starts over after drift."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fuse.intrastage.placement import Replica
from fuse.intrastage.planner import PROFILE_NAME, Planner, PlanSettings
from fuse.intrastage.profile import Profile, Shape, StageCosts, profile_from_json
from fuse.trace import Span
from schedules import evaluate, violations

PLACEMENT = (Replica("actor", 0, (0, 1)), Replica("critic", 0, (1, 0)))
SHAPES = [Shape(2, 64), Shape(2, 16), Shape(2, 64), Shape(2, 32)]


class Measurement:
    """Stands in for the ranks: counts how often it is asked, and for which micro-batches."""

    def __init__(self, free_bytes: int | None = None) -> None:
        self.asked: list[list[Shape]] = []
        self.free_bytes = free_bytes

    def __call__(self, indices: Sequence[int]) -> tuple[Profile, int | None]:
        shapes = [SHAPES[index] for index in indices]
        self.asked.append(shapes)
        stages = tuple(
            StageCosts(
                pipeline=replica.name,
                stage=stage,
                shape=shape,
                forward_ticks=shape.size,
                backward_ticks=2 * shape.size,
                input_grad_ticks=shape.size,
                weight_grad_ticks=shape.size,
                activation_bytes=shape.size,
                weight_grad_bytes=shape.size // 2,
            )
            for replica in PLACEMENT
            for stage in range(2)
            for shape in shapes
        )
        return Profile(tick_s=1e-4, stages=stages, transfers=()), self.free_bytes


def settings(directory: Path, *, fused: bool = True, memory_limit_bytes: int | None = None) -> PlanSettings:
    return PlanSettings(
        fused=fused,
        time_limit_s=1.0,
        num_workers=1,
        num_steps=10,
        memory_limit_bytes=memory_limit_bytes,
        replan_drift=0.3,
        directory=directory,
    )


def test_measures_once_and_plans_every_count(tmp_path: Path) -> None:
    measure, planner = Measurement(), Planner(PLACEMENT, settings(tmp_path))
    plans = planner.plans({2, 4}, SHAPES, measure)
    assert measure.asked == [[Shape(2, 16), Shape(2, 64)]], "one of each of the smallest, the median and the largest"
    for count, plan in plans.items():
        assert violations(plan.schedule) == []
        assert [pipeline.num_micro_batches for pipeline in plan.schedule.problem.pipelines] == [count, count]
        assert plan.serial_bubble_ratio is not None
        assert evaluate(plan.schedule).bubble_ratio < plan.serial_bubble_ratio
    assert planner.plans({4}, SHAPES, measure) == {4: plans[4]}
    assert len(measure.asked) == 1
    assert planner.serial_bubble_ratio is not None
    assert profile_from_json(json.loads((tmp_path / PROFILE_NAME).read_text())) == plans[2].profile
    assert len(list(tmp_path.glob("*.schedule"))) == 2


def test_without_fusion_nothing_is_measured_nor_written(tmp_path: Path) -> None:
    measure, planner = Measurement(), Planner(PLACEMENT, settings(tmp_path, fused=False))
    (plan,) = planner.plans({3}, SHAPES, measure).values()
    assert plan.profile is None
    assert plan.serial_bubble_ratio is None
    assert planner.serial_bubble_ratio is None
    assert measure.asked == []
    assert not list(tmp_path.iterdir())
    assert [op.pipeline for op in plan.schedule.ranks[0]] == [0] * 6 + [1] * 6


@pytest.mark.parametrize(("option", "free"), [(300, None), (None, 300), (300, 10_000)])
def test_memory_must_suffice_for_the_largest(tmp_path: Path, option: int | None, free: int | None) -> None:
    planner = Planner(PLACEMENT, settings(tmp_path, memory_limit_bytes=option))
    (plan,) = planner.plans({4}, SHAPES, Measurement(free)).values()
    assert max(evaluate(plan.schedule).peak_bytes) <= 300  # two micro-batches of 2 x 64 tokens
    with pytest.raises(ValueError, match="rank"):
        Planner(PLACEMENT, settings(tmp_path, memory_limit_bytes=100)).plans({4}, SHAPES, Measurement(free))


def spans(slowdown: float, *, of_one_stage: float = 1.0) -> list[Span]:
    """What four stages executed, planned at 10 ms each."""
    factors = {"F actor.0.0": of_one_stage, "F actor.1.0": 1.0, "B actor.0.0": 1.0, "F critic.0.0": 1.0}
    return [
        Span(name, "train", 0.0, 0.01 * slowdown * factor, {"planned_start_s": 0.0, "planned_end_s": 0.01})
        for name, factor in factors.items()
    ]


def test_only_lasting_drift_of_a_stage_against_the_others_plans_again(tmp_path: Path) -> None:
    measure, planner = Measurement(), Planner(PLACEMENT, settings(tmp_path))

    def times_measured_after(updates: list[list[Span]]) -> int:
        for update in updates:
            planner.observe(update)
        planner.plans({4}, SHAPES, measure)
        return len(measure.asked)

    assert times_measured_after([]) == 1
    assert times_measured_after([spans(5.0)] * 20) == 1, "a machine that is slower all over changes no schedule"
    assert times_measured_after([spans(1.0, of_one_stage=2.0)] * 9) == 1
    assert times_measured_after([spans(1.0)]) == 1
    assert times_measured_after([spans(1.0, of_one_stage=2.0)] * 9) == 1, "not ten in a row"
    assert times_measured_after([spans(1.0, of_one_stage=0.5)]) == 2
    assert times_measured_after([[Span("F actor.0.0", "train", 0.0, 1.0)]] * 5) == 2, "nothing was planned"
