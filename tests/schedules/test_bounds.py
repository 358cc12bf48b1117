"""Bounds hold for the optimum of tiny problems, equal it where it is known, and say what limit would do."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules import Pipeline, Problem, evaluate, violations
from schedules.baselines import one_f_one_b, serial
from schedules.bounds import (
    check_feasible,
    makespan_lower_bound,
    peak_memory_lower_bound,
    preemptive_makespan,
    smallest_limits,
)
from schedules.fused.exhaustive import optimum
from schedules.instances import actor_and_critic
from schedules.random_problems import random_problem, random_schedule


def _tiny(random: Random) -> Problem:
    """At most 10 forwards and backwards on two ranks."""
    while True:
        problem = random_problem(random, max_ranks=2, max_pipelines=2, max_stages=2, max_micro_batches=2, max_ticks=5)
        if sum(p.num_stages * p.num_micro_batches * (2 + p.can_split) for p in problem.pipelines) <= 10:
            return problem


@given(st.integers(0, 10**6))
def test_no_optimum_is_below_its_bounds(seed: int) -> None:
    problem = _tiny(Random(seed))
    best = evaluate(optimum(problem))
    assert makespan_lower_bound(problem) <= best.makespan
    assert peak_memory_lower_bound(problem, best.makespan) <= max(best.peak_bytes)
    tight = replace(problem, memory_limit_bytes=tuple(max(0, b) for b in smallest_limits(problem)))
    assert makespan_lower_bound(problem) <= makespan_lower_bound(tight) <= evaluate(optimum(tight)).makespan


@given(st.randoms(use_true_random=False))
def test_no_schedule_is_below_its_bounds(random: Random) -> None:
    problem = random_problem(random, max_forward_only=2)
    timing = evaluate(random_schedule(problem, random))
    limited = replace(problem, memory_limit_bytes=timing.peak_bytes)
    assert makespan_lower_bound(limited) <= timing.makespan
    assert peak_memory_lower_bound(problem, timing.makespan) <= max(timing.peak_bytes)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 1), (2, 5), (4, 4), (8, 3), (8, 32)])
def test_one_pipeline_of_equal_stages_meets_its_bounds(num_stages: int, num_micro_batches: int) -> None:
    # 1F1B is optimal: its makespan is head, work and tail of every rank, and a later first backward costs time.
    pipeline = Pipeline(
        name="model",
        ranks=tuple(range(num_stages)),
        num_micro_batches=num_micro_batches,
        forward_ticks=(1,) * num_stages,
        backward_ticks=(2,) * num_stages,
        activation_bytes=(7,) * num_stages,
    )
    problem = Problem(num_ranks=num_stages, pipelines=(pipeline,))
    timing = evaluate(one_f_one_b(problem))
    assert makespan_lower_bound(problem) == timing.makespan
    assert peak_memory_lower_bound(problem, timing.makespan) == max(timing.peak_bytes)


def test_memory_below_a_round_trip_costs_makespan() -> None:
    # 4 stages, room for 2 micro-batches at each: stage 0 sends two per round trip of 4 * (1 + 2) ticks.
    # Micro-batch 6 leaves after three round trips and takes one more with micro-batch 7 right behind it.
    pipeline = Pipeline(
        name="model",
        ranks=(0, 1, 2, 3),
        num_micro_batches=8,
        forward_ticks=(1,) * 4,
        backward_ticks=(2,) * 4,
        activation_bytes=(1,) * 4,
    )
    problem = Problem(num_ranks=4, pipelines=(pipeline,), memory_limit_bytes=(2,) * 4)
    assert makespan_lower_bound(replace(problem, memory_limit_bytes=None)) == (8 + 3) * 3
    assert makespan_lower_bound(problem) >= 4 * 12 + 2


def test_a_split_backward_has_a_lower_bound_of_its_own() -> None:
    # One stage per rank, one micro-batch: F F I I, then both ranks owe a W that nothing waits for.
    pipeline = Pipeline(
        name="model",
        ranks=(0, 1),
        num_micro_batches=1,
        forward_ticks=(1, 1),
        backward_ticks=(4, 4),
        input_grad_ticks=(1, 1),
        weight_grad_ticks=(3, 3),
    )
    problem = Problem(num_ranks=2, pipelines=(pipeline,))
    assert makespan_lower_bound(problem) == 1 + 1 + 1 + 1 + 3 == evaluate(optimum(problem)).makespan


@pytest.mark.parametrize(
    ("shape", "makespan", "memory"),
    [
        ((8, 4, 16, 8, 5, 4, 1.95, 2), 372, 15.6),
        ((8, 8, 8, 8, 5, 2, 1.95, 1), 225, 15.6),
        ((16, 16, 16, 16, 2, 1, 1.64, 1), 186, 26.24),
    ],
)
def test_published_instances(shape: tuple[float, ...], makespan: int, memory: float) -> None:
    names = ("actor_stages", "critic_stages", "actor_microbatches", "critic_microbatches")
    names += ("actor_forward", "critic_forward", "actor_activation", "critic_activation")
    instance = actor_and_critic(**dict(zip(names, shape, strict=True)))  # type: ignore[arg-type]
    assert makespan_lower_bound(instance.problem) == makespan
    assert instance.units(peak_memory_lower_bound(instance.problem, makespan)) == memory


def test_jacksons_rule_by_hand() -> None:
    assert preemptive_makespan([]) == 0
    assert preemptive_makespan([(3, 2, 4)]) == 9
    # 0-1 job a, 1-3 job b interrupts it (longer tail), 3-5 the rest of a: max(3 + 9, 5 + 1).
    assert preemptive_makespan([(0, 3, 1), (1, 2, 9)]) == 12


@given(st.randoms(use_true_random=False))
def test_the_smallest_limits_are_enough_and_needed(random: Random) -> None:
    problem = random_problem(random, max_micro_batches=1)
    limits = smallest_limits(problem)
    enough = replace(problem, memory_limit_bytes=limits)
    check_feasible(enough)
    if all(len(set(p.ranks)) == p.num_stages for p in problem.pipelines):
        assert violations(replace(serial(problem), problem=enough)) == []
    rank = random.randrange(problem.num_ranks)
    if limits[rank] > problem.initial_bytes[rank]:
        lower = tuple(limit - (r == rank) for r, limit in enumerate(limits))
        with pytest.raises(ValueError, match=f"rank {rank}: limit of {lower[rank]} bytes .* it needs {limits[rank]}"):
            makespan_lower_bound(replace(problem, memory_limit_bytes=lower))


def test_a_makespan_below_the_bound_has_no_peak() -> None:
    instance = actor_and_critic(
        actor_stages=2, critic_stages=2, actor_microbatches=2, critic_microbatches=2, actor_forward=1, critic_forward=1
    )
    with pytest.raises(ValueError, match="no schedule takes 3 ticks"):
        peak_memory_lower_bound(instance.problem, 3)
