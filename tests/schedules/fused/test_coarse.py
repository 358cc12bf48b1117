"""Durations beyond what native code counts: solved in coarser ticks, and told in the problem's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from schedules import Problem, evaluate, violations
from schedules.bounds import makespan_lower_bound
from schedules.fused.coarse import coarsened
from schedules.fused.compiled import MAX_TICKS, compile_problem
from schedules.fused.incumbent import Improvement
from schedules.fused.solve import Objective, Status, solve
from schedules.instances import actor_and_critic

SMALL = actor_and_critic(
    actor_stages=4,
    critic_stages=2,
    actor_microbatches=4,
    critic_microbatches=2,
    actor_forward=5,
    critic_forward=4,
    actor_activation=1.95,
    critic_activation=2,
).problem


def in_finer_ticks(problem: Problem, factor: int, transfer_ticks: int = 0) -> Problem:
    """The same durations, of so many times the ticks."""

    def ticks(own: Any) -> Any:
        return own and tuple(factor * one for one in own)

    names = ("forward_ticks", "backward_ticks", "input_grad_ticks", "weight_grad_ticks")
    pipelines = tuple(
        replace(one, transfer_ticks=factor * transfer_ticks, **{name: ticks(getattr(one, name)) for name in names})
        for one in problem.pipelines
    )
    return replace(problem, pipelines=pipelines)


def test_a_problem_that_can_be_counted_is_searched_as_it_is() -> None:
    problem, factor = coarsened(SMALL)
    assert problem is SMALL
    assert factor == 1


@pytest.mark.parametrize("ticks", [MAX_TICKS // 400, 10**8 + 1, 2**36 // 3])
def test_ticks_are_no_finer_than_is_counted(ticks: int) -> None:
    fine = in_finer_ticks(SMALL, ticks, transfer_ticks=1)
    coarse, factor = coarsened(fine)
    for one, other in zip(coarse.pipelines, fine.pipelines, strict=True):
        for own, of_fine in zip(one.forward_ticks, other.forward_ticks, strict=True):
            assert abs(own * factor - of_fine) <= factor / 2
        assert abs(one.transfer_ticks * factor - other.transfer_ticks) <= factor / 2
        assert one.activation_bytes == other.activation_bytes
    for split in (False, True):
        compile_problem(coarse, split=split)


def test_an_operation_takes_a_tick_at_least() -> None:
    (first, *others) = in_finer_ticks(SMALL, 10**10).pipelines
    mixed = replace(SMALL, pipelines=(replace(first, forward_ticks=(1,) * first.num_stages), *others))
    assert coarsened(mixed)[0].pipelines[0].forward_ticks == (1,) * first.num_stages


def test_a_forward_only_pipeline_is_counted_without_backwards() -> None:
    (first, *_) = SMALL.pipelines
    bare = {"activation_bytes": (), "weight_grad_bytes": (), "input_grad_ticks": None, "weight_grad_ticks": None}
    scorer = replace(first, name="scorer", backward_ticks=(), before=0, **bare)
    fine = in_finer_ticks(replace(SMALL, pipelines=(*SMALL.pipelines, scorer)), 10**9)
    coarse, factor = coarsened(fine)
    assert factor > 1
    assert (coarse.pipelines[-1].backward_ticks, coarse.pipelines[-1].before) == ((), 0)
    compile_problem(coarse, split=False)


@pytest.mark.parametrize("objective", list(Objective))
def test_a_problem_beyond_the_most_is_solved_and_told_in_its_own_ticks(objective: Objective) -> None:
    best = makespan_lower_bound(SMALL)  # which can be had, by the test of the makespan alone
    fine = in_finer_ticks(SMALL, 10**8 + 1)
    with pytest.raises(ValueError, match="use a coarser tick"):
        compile_problem(fine, split=False)
    told: list[Improvement] = []
    limit_s = 60.0 if objective is Objective.MAKESPAN else 1.0  # memory takes long to prove
    found = solve(fine, time_limit_s=limit_s, objective=objective, progress=told.append)
    assert violations(found.schedule) == []
    assert found.schedule.problem == fine
    timing = evaluate(found.schedule)
    assert (timing.makespan, max(timing.peak_bytes)) == (found.makespan, found.peak_bytes)
    assert found.makespan_lower_bound == makespan_lower_bound(fine) == (10**8 + 1) * best
    if objective is Objective.MAKESPAN:
        assert found.makespan == found.makespan_lower_bound
        assert found.status is not Status.FEASIBLE
    assert found.memory_lower_bound <= found.peak_bytes
    assert told[-1].makespan == found.history[-1].makespan == pytest.approx(found.makespan, rel=1e-6)
