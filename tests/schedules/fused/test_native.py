"""Native evaluation equals the Python reference; native searches are legal, reproducible, no worse than their start."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules import Pipeline, Problem, Schedule, _native, evaluate, violations
from schedules.fused.compiled import compile_operations, compile_problem
from schedules.fused.greedy import greedy
from schedules.instances import actor_and_critic
from schedules.random_problems import random_problem, random_schedule

INSTANCE = actor_and_critic(
    actor_stages=4,
    critic_stages=2,
    actor_microbatches=8,
    critic_microbatches=4,
    actor_forward=5,
    critic_forward=4,
    actor_activation=1.95,
    critic_activation=2,
)


@given(st.randoms(use_true_random=False))
def test_native_evaluation_equals_the_reference(random: Random) -> None:
    problem = random_problem(random, max_forward_only=2)
    schedule = random_schedule(problem, random)
    compiled = compile_operations(problem, {op for _, op in schedule.ops()})
    makespan, start, peak_bytes = compiled.evaluate(schedule)
    timing = evaluate(schedule)
    assert makespan == timing.makespan
    assert tuple(peak_bytes.tolist()) == timing.peak_bytes
    for order, starts in zip(schedule.ranks, timing.start, strict=True):
        assert tuple(int(start[compiled.node_of[op]]) for op in order) == starts


def test_native_evaluation_refuses_a_deadlock() -> None:
    pipeline = Pipeline(name="m", ranks=(0, 1), num_micro_batches=1, forward_ticks=(1, 1), backward_ticks=(1, 1))
    compiled = compile_problem(Problem(num_ranks=2, pipelines=(pipeline,)), split=False)
    forward = greedy(compiled.problem)
    backward_first = Schedule(compiled.problem, tuple(order[::-1] for order in forward.ranks))
    with pytest.raises(ValueError, match="deadlocks"):
        compiled.evaluate(backward_first)


def _anneal(seed: int, chunk: int, window: int = 0, *, split: bool = False) -> Schedule:
    problem = replace(
        INSTANCE.problem, pipelines=tuple(_with_halves(p) if split else p for p in INSTANCE.problem.pipelines)
    )
    compiled = compile_problem(problem, split=split)
    start = random_start(problem, split)
    options = _native.AnnealingOptions()
    options.window = window
    peak = max(evaluate(start).peak_bytes)
    caps = np.full(problem.num_ranks, peak - 39, np.int64)
    annealing = _native.Annealing(compiled.graph, *compiled.orders(start), caps, 1, 30_000, seed, options)
    while not annealing.advance(chunk):
        pass
    assert annealing.num_steps_done == 30_000
    assert annealing.found
    schedule = compiled.schedule(annealing.best())
    assert violations(replace(schedule, problem=replace(problem, memory_limit_bytes=tuple(caps.tolist())))) == []
    assert evaluate(schedule).makespan == annealing.best_makespan < evaluate(start).makespan
    return schedule


def _with_halves(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, input_grad_ticks=pipeline.forward_ticks, weight_grad_ticks=pipeline.forward_ticks)


def random_start(problem: Problem, split: bool) -> Schedule:
    """Greedy with each backward replaced by its halves."""
    schedule = greedy(problem)
    if not split:
        return schedule
    halves = {"B": ("I", "W"), "F": ("F",)}
    return replace(
        schedule,
        ranks=tuple(
            tuple(op._replace(kind=type(op.kind)(kind)) for op in order for kind in halves[op.kind])
            for order in schedule.ranks
        ),
    )


@pytest.mark.parametrize("window", [0, 60])
@pytest.mark.parametrize("split", [False, True])
def test_annealing_depends_on_seed_and_steps_alone(window: int, split: bool) -> None:
    first = _anneal(7, 1_000, window, split=split)
    assert _anneal(7, 30_000, window, split=split) == first
    assert _anneal(8, 1_000, window, split=split) != first


@given(st.randoms(use_true_random=False))
def test_annealing_stays_legal_on_any_problem(random: Random) -> None:
    problem = random_problem(random, max_forward_only=2)
    start = random_schedule(problem, random)
    compiled = compile_operations(problem, {op for _, op in start.ops()})
    peaks = evaluate(start).peak_bytes
    caps = np.array(peaks, dtype=np.int64)
    options = _native.AnnealingOptions()
    annealing = _native.Annealing(compiled.graph, *compiled.orders(start), caps, 1, 500, random.randrange(99), options)
    annealing.advance(500)
    best = compiled.schedule(annealing.best())
    assert violations(replace(best, problem=replace(problem, memory_limit_bytes=peaks))) == []
    assert evaluate(best).makespan == annealing.best_makespan <= evaluate(start).makespan


@given(st.randoms(use_true_random=False), st.booleans())
def test_reservation_schedules_are_legal_on_any_problem(random: Random, split: bool) -> None:
    problem = random_problem(random, max_forward_only=2)
    compiled = compile_problem(problem, split=split)
    groups = list(range(len(problem.pipelines)))
    limits = tuple(peak + random.randint(0, 5) for peak in evaluate(greedy(problem)).peak_bytes)
    search = _native.ReservationSearch(compiled.graph, groups, np.array(limits, dtype=np.int64), 1, 3)
    search.advance(30)
    if search.found:
        schedule = compiled.schedule(search.best())
        assert violations(replace(schedule, problem=replace(problem, memory_limit_bytes=limits))) == []
        assert evaluate(schedule).makespan == search.best_makespan


def test_reservation_search_depends_on_seed_and_trials_alone() -> None:
    compiled = compile_problem(INSTANCE.problem, split=False)
    caps = np.full(INSTANCE.problem.num_ranks, 10**6, np.int64)

    def search(chunk: int) -> Schedule:
        found = _native.ReservationSearch(compiled.graph, [0, 1, 1], caps, 1, 5)
        for _ in range(300 // chunk):
            found.advance(chunk)
        return compiled.schedule(found.best())

    assert search(10) == search(300)


def test_too_many_ticks_for_native_code_are_refused() -> None:
    pipeline = Pipeline(name="m", ranks=(0,), num_micro_batches=2, forward_ticks=(2**29,), backward_ticks=(1,))
    with pytest.raises(ValueError, match="use a coarser tick"):
        compile_problem(Problem(num_ranks=1, pipelines=(pipeline,)), split=False)
