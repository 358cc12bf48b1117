"""The solver returns legal schedules, no worse than a baseline, no better than the bounds, and says what it proved."""

from __future__ import annotations

import threading
from dataclasses import replace
from random import Random

import pytest

from schedules import Kind, Pipeline, Problem, Schedule, evaluate, violations
from schedules.baselines import serial
from schedules.bounds import smallest_limits
from schedules.fused import portfolio
from schedules.fused.compiled import compile_problem
from schedules.fused.exhaustive import optimum
from schedules.fused.greedy import greedy
from schedules.fused.halves import in_form_of, join_halves
from schedules.fused.incumbent import Improvement
from schedules.fused.solve import Objective, Status, solve
from schedules.instances import actor_and_critic
from schedules.random_problems import random_problem, random_schedule

from ...examples import examples

SMALL = actor_and_critic(
    actor_stages=4,
    critic_stages=2,
    actor_microbatches=4,
    critic_microbatches=2,
    actor_forward=5,
    critic_forward=4,
    actor_activation=1.95,
    critic_activation=2,
)


def test_random_problems_are_solved_within_their_bounds() -> None:
    random = Random(3)
    for _ in range(examples(8)):
        problem = random_problem(random, max_forward_only=2)
        if random.random() < 0.5:
            problem = replace(problem, memory_limit_bytes=evaluate(greedy(problem)).peak_bytes)
        solution = solve(problem, time_limit_s=0.4, seed=1)
        assert violations(solution.schedule) == []
        assert solution.schedule.problem == problem
        timing = evaluate(solution.schedule)
        assert (timing.makespan, max(timing.peak_bytes)) == (solution.makespan, solution.peak_bytes)
        assert solution.makespan_lower_bound <= solution.makespan <= evaluate(greedy(problem)).makespan
        assert solution.memory_lower_bound <= solution.peak_bytes
        assert [(i.makespan, i.peak_bytes) for i in solution.history] == sorted(
            {(i.makespan, i.peak_bytes) for i in solution.history}, reverse=True
        )
        assert solution.history[-1].found_by == solution.found_by
        if solution.status is Status.OPTIMAL:
            assert solution.makespan_gap == solution.memory_gap == 0


def test_the_memory_bound_is_left_out_where_memory_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It takes a search over limits, each of which takes a bound on the makespan."""
    full = solve(SMALL.problem, time_limit_s=0.2)
    monkeypatch.setattr(portfolio, "peak_memory_lower_bound", None)
    shortest = solve(SMALL.problem, time_limit_s=0.2, objective=Objective.MAKESPAN)
    assert max(smallest_limits(SMALL.problem)) == shortest.memory_lower_bound <= full.memory_lower_bound


def test_tiny_problems_are_proven_optimal() -> None:
    random = Random(11)
    num_solved = 0
    while num_solved < examples(6):
        problem = random_problem(random, max_ranks=2, max_pipelines=2, max_stages=2, max_micro_batches=2, max_ticks=5)
        operations = sum(p.num_stages * p.num_micro_batches * (2 + p.can_split) for p in problem.pipelines)
        if operations > 10 or any(p.can_split or len(set(p.ranks)) < p.num_stages for p in problem.pipelines):
            continue
        solution = solve(problem, time_limit_s=120)
        best = evaluate(optimum(problem))
        assert (solution.makespan, solution.peak_bytes) == (best.makespan, max(best.peak_bytes))
        assert solution.status is Status.OPTIMAL
        num_solved += 1


def test_fusion_beats_one_model_after_the_other() -> None:
    solution = solve(SMALL.problem, time_limit_s=120)
    assert solution.makespan == solution.makespan_lower_bound < evaluate(serial(SMALL.problem)).makespan
    assert solution.status in (Status.OPTIMAL, Status.MAKESPAN_OPTIMAL)


def test_splitting_backwards_shortens_the_schedule() -> None:
    def with_halves(pipeline: Pipeline) -> Pipeline:
        halves = pipeline.forward_ticks
        return replace(
            pipeline,
            input_grad_ticks=halves,
            weight_grad_ticks=halves,
            weight_grad_bytes=pipeline.activation_bytes,
        )

    split = replace(SMALL.problem, pipelines=tuple(map(with_halves, SMALL.problem.pipelines)))
    whole = solve(SMALL.problem, time_limit_s=3, objective=Objective.MAKESPAN)
    halved = solve(split, time_limit_s=3, objective=Objective.MAKESPAN)
    assert halved.makespan < whole.makespan
    assert violations(halved.schedule) == []


def test_an_infeasible_limit_names_rank_and_remedy() -> None:
    limits = (10**6, 38, 10**6, 10**6)
    with pytest.raises(ValueError, match="rank 1: limit of 38 bytes is too small for one micro-batch; it needs 40"):
        solve(replace(SMALL.problem, memory_limit_bytes=limits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_limit_s": 0}, "time_limit_s 0 must be positive and at most"),
        ({"time_limit_s": float("nan")}, "time_limit_s nan must be positive and at most"),
        ({"time_limit_s": float("inf")}, "time_limit_s inf must be positive and at most"),
        ({"num_workers": 0}, "num_workers 0 must be from 1 to 1024"),
        ({"num_workers": 10**9}, "num_workers 1000000000 must be from 1 to 1024"),
        ({"seed": -1}, "seed -1 must be from 0 to 2147483647"),
        ({"seed": 1 << 31}, "seed 2147483648 must be from 0 to 2147483647"),
    ],
)
def test_parameters_out_of_range_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(SMALL.problem, **change)  # type: ignore[arg-type]


def test_stop_returns_the_best_so_far() -> None:
    stop, seen = threading.Event(), list[Improvement]()

    def progress(improvement: Improvement) -> None:
        seen.append(improvement)
        stop.set()

    problem = replace(SMALL.problem, pipelines=tuple(replace(p, num_micro_batches=40) for p in SMALL.problem.pipelines))
    solution = solve(problem, time_limit_s=120, progress=progress, stop=stop)
    assert solution.seconds < 60
    assert tuple(seen) == solution.history
    assert [one.found_by for one in seen] == ["greedy"], "and no baseline is made any more"
    assert violations(solution.schedule) == []


def test_an_error_in_a_worker_ends_the_search() -> None:
    class Broken(Exception):
        pass

    def progress(improvement: Improvement) -> None:
        if improvement.found_by not in ("greedy", "serial 1f1b"):
            raise Broken

    with pytest.raises(Broken):
        solve(SMALL.problem, time_limit_s=60, progress=progress)


def test_whole_and_halved_backwards_stand_for_one_another() -> None:
    random = Random(2)
    for _ in range(examples(20)):
        problem = random_problem(random, max_forward_only=2)
        mixed = random_schedule(problem, random)
        for split in (False, True):
            compiled = compile_problem(problem, split=split)
            changed = in_form_of(compiled, mixed)
            assert {op for _, op in changed.ops()} == set(compiled.ops)
            assert violations(changed) == []
        joined = join_halves(in_form_of(compile_problem(problem, split=True), mixed))
        assert violations(joined) == []
        halved = in_form_of(compile_problem(problem, split=True), mixed)
        assert _quality(joined) <= _quality(halved)


def _quality(schedule: Schedule) -> tuple[int, int]:
    timing = evaluate(schedule)
    return timing.makespan, max(timing.peak_bytes)


def test_a_rank_may_be_idle() -> None:
    pipeline = Pipeline(name="m", ranks=(0, 2), num_micro_batches=2, forward_ticks=(1, 1), backward_ticks=(1, 1))
    solution = solve(Problem(num_ranks=3, pipelines=(pipeline,)), time_limit_s=120)
    assert solution.status is Status.OPTIMAL
    assert solution.schedule.ranks[1] == ()


def test_halves_that_cost_time_are_used_where_they_save_more() -> None:
    # i + w = 4 > b = 3. 1F1B takes (4 + 3)(2 + 3) = 35; ZB-H1 4 (2 + 4) + 3 (2 + 2 - 2) = 30; halves in one place and
    # whole backwards in another can only be better.
    pipeline = Pipeline(
        name="m",
        ranks=(0, 1, 2, 3),
        num_micro_batches=4,
        forward_ticks=(2,) * 4,
        backward_ticks=(3,) * 4,
        input_grad_ticks=(2,) * 4,
        weight_grad_ticks=(2,) * 4,
        activation_bytes=(1,) * 4,
    )
    solution = solve(Problem(num_ranks=4, pipelines=(pipeline,)), time_limit_s=1, objective=Objective.MAKESPAN)
    assert solution.makespan <= 30
    assert {op.kind for _, op in solution.schedule.ops()} >= {Kind.I, Kind.W}


def test_one_worker_is_enough() -> None:
    solution = solve(SMALL.problem, time_limit_s=120, num_workers=1)
    assert solution.makespan == solution.makespan_lower_bound
