"""From a profile to the schedule that runs: the problem says what was measured, and fusing beats serial."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fuse.intrastage import training_schedule
from fuse.intrastage.cost_profile import Profile, Shape, StageCosts, TransferCosts
from fuse.intrastage.placement import Replica
from fuse.intrastage.training_schedule import fused_problem, fused_schedule, solved
from schedules import evaluate, violations
from schedules.baselines import serial
from schedules.bounds import makespan_lower_bound
from schedules.fused.cache import ScheduleCache

SHAPE = Shape(2, 64)
REPLICAS = (Replica("actor", 0, (0, 1)), Replica("critic", 0, (1, 0)))


def costs(replica: Replica, stage: int, ticks: int, *, split: bool = True) -> StageCosts:
    return StageCosts(
        pipeline=replica.name,
        stage=stage,
        shape=SHAPE,
        forward_ticks=ticks,
        backward_ticks=2 * ticks,
        input_grad_ticks=ticks if split else None,
        weight_grad_ticks=ticks + 1 if split else None,
        activation_bytes=100 + stage,
        weight_grad_bytes=50 + stage if split else 0,
    )


PROFILE = Profile(
    tick_s=1e-3,
    stages=tuple(costs(replica, stage, 10 + stage) for replica in REPLICAS for stage in range(2)),
    transfers=tuple(TransferCosts(pipeline=one.name, stage=0, shape=SHAPE, ticks=2) for one in REPLICAS),
)


def test_the_problem_holds_what_was_measured() -> None:
    problem = fused_problem(PROFILE, REPLICAS, 4, SHAPE, memory_limit_bytes=1000)
    assert problem.memory_limit_bytes == (1000, 1000)
    assert [pipeline.ranks for pipeline in problem.pipelines] == [(0, 1), (1, 0)]
    for pipeline in problem.pipelines:
        assert pipeline.num_micro_batches == 4
        assert pipeline.forward_ticks == (10, 11)
        assert pipeline.backward_ticks == (20, 22)
        assert pipeline.input_grad_ticks == (10, 11)
        assert pipeline.weight_grad_ticks == (11, 12)
        assert pipeline.activation_bytes == (100, 101)
        assert pipeline.weight_grad_bytes == (50, 51)
        assert pipeline.transfer_ticks == 2


def test_a_pipeline_with_a_stage_that_cannot_split_is_planned_whole() -> None:
    mixed = replace(PROFILE, stages=(costs(REPLICAS[0], 0, 10, split=False), *PROFILE.stages[1:]))
    problem = fused_problem(mixed, REPLICAS, 4, SHAPE)
    assert [pipeline.can_split for pipeline in problem.pipelines] == [False, True]
    assert problem.memory_limit_bytes is None


def test_replicas_of_a_model_share_its_micro_batches() -> None:
    replicas = (REPLICAS[0], Replica("critic", 0, (0,)), Replica("critic", 1, (1,)))
    stages = (*PROFILE.stages[:2], *(costs(replica, 0, 20) for replica in replicas[1:]))
    problem = fused_problem(replace(PROFILE, stages=stages), replicas, 5, SHAPE)
    assert [(one.name, one.num_micro_batches) for one in problem.pipelines] == [
        ("actor", 5),
        ("critic.0", 3),
        ("critic.1", 2),
    ]
    assert problem.pipelines[1].forward_ticks == (20,)


def test_the_fused_schedule_is_legal_shorter_than_serial_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ScheduleCache(tmp_path)
    with caplog.at_level(logging.INFO, "fuse.intrastage.training_schedule"):
        schedule = fused_schedule(PROFILE, REPLICAS, 2, SHAPE, cache=cache, time_limit_s=1.0, num_workers=1)
        again = fused_schedule(PROFILE, REPLICAS, 2, SHAPE, cache=cache, time_limit_s=1.0, num_workers=1)
    assert violations(schedule) == []
    assert evaluate(schedule).makespan < evaluate(serial(schedule.problem)).makespan
    assert again == schedule
    assert "lower bound" in caplog.messages[0]
    assert "kept from an earlier search" in caplog.messages[1]
    makespan_s = evaluate(schedule).makespan * PROFILE.tick_s
    assert f"{makespan_s:.3f} s" in caplog.messages[0]


def test_memory_is_never_planned_beyond_its_limit() -> None:
    schedule = fused_schedule(PROFILE, REPLICAS, 3, SHAPE, memory_limit_bytes=320, time_limit_s=1.0, num_workers=1)
    assert max(evaluate(schedule).peak_bytes) <= 320
    with pytest.raises(ValueError, match="rank"):
        fused_schedule(PROFILE, REPLICAS, 3, SHAPE, memory_limit_bytes=50)
    with pytest.raises(ValueError, match=r"no stage 0 of pipeline actor\.0: measure it"):
        fused_schedule(replace(PROFILE, stages=PROFILE.stages[2:]), REPLICAS, 3, SHAPE)


def test_of_schedules_as_short_one_that_holds_less_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this problem the first schedule found of the least makespan has a peak of 401."""
    monkeypatch.setattr(training_schedule, "_MEMORY_SEARCH_S", 60.0)  # the search ends when it has proven the least
    stages = tuple(costs(replica, stage, 10, split=False) for replica in REPLICAS for stage in range(2))
    profile = replace(PROFILE, stages=stages)
    schedule = fused_schedule(profile, REPLICAS, 3, SHAPE, time_limit_s=60.0, num_workers=1)
    timing, problem = evaluate(schedule), schedule.problem
    heedless = evaluate(solved(problem, time_limit_s=60.0, num_workers=1).schedule)
    assert timing.makespan == heedless.makespan == makespan_lower_bound(problem)
    assert max(timing.peak_bytes) < max(heedless.peak_bytes) == 401
