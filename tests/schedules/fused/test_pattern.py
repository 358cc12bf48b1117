"""A pattern repeats without conflict and holds little; unrolled, it is a legal schedule of all micro-batches."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from schedules import Kind, Op, Pipeline, Problem, Schedule, evaluate, violations
from schedules.bounds import makespan_lower_bound
from schedules.fused.compiled import compile_problem
from schedules.fused.local_search import memory_caps
from schedules.fused.pattern import Pattern, find_pattern, shortest_unrolling, unroll
from schedules.instances import actor_and_critic
from schedules.random_problems import random_problem
from schedules.walk import needs

from ...examples import examples


def _free(problem: Problem) -> NDArray[np.int64]:
    return memory_caps(problem)


def _unroll(pattern: Pattern, ahead: tuple[int, ...], caps: NDArray[np.int64], *, patient: bool) -> Schedule | None:
    return unroll(pattern, compile_problem(pattern.problem, split=False), ahead, caps, patient=patient)


def _pipeline(name: str, ranks: tuple[int, ...], num_micro_batches: int) -> Pipeline:
    stages = len(ranks)
    return Pipeline(
        name=name,
        ranks=ranks,
        num_micro_batches=num_micro_batches,
        forward_ticks=(1,) * stages,
        backward_ticks=(1,) * stages,
        activation_bytes=(1,) * stages,
    )


def _assert_repeats(pattern: Pattern) -> None:
    problem, period = pattern.problem, pattern.period_ticks
    busy: list[set[int]] = [set() for _ in range(problem.num_ranks)]
    for op, start in pattern.start.items():
        ticks = {tick % period for tick in range(start, start + problem.ticks(op))}
        assert len(ticks) == problem.ticks(op)
        assert not ticks & busy[problem.rank_of(op)]
        busy[problem.rank_of(op)] |= ticks
        for source in needs(pattern.start, op, problem):
            assert start >= pattern.start[source] + problem.ticks(source) + problem.transfer_ticks(source, op)


@pytest.mark.parametrize(("transfer", "round_trip", "makespan"), [(0, 3, 18), (3, 9, 24)])
def test_one_pipeline_holds_what_its_round_trip_needs(transfer: int, round_trip: int, makespan: int) -> None:
    # F0 F1 B1 B0 take four ticks and two transfers; the ranks have two ticks of work per period. From the start of F0
    # to that of B0 rank 0 holds an activation, which takes three ticks and the transfers: no pattern can do with less.
    pipeline = replace(_pipeline("m", (0, 1), 8), transfer_ticks=transfer)
    pattern = find_pattern(Problem(num_ranks=2, pipelines=(pipeline,)), time_limit_s=120)
    assert pattern is not None
    assert pattern.period_ticks == 2
    assert pattern.start[Op(0, 0, 0, Kind.B)] - pattern.start[Op(0, 0, 0, Kind.F)] == round_trip
    _assert_repeats(pattern)
    # Rank 1 works for 16 ticks, after the first forward has come and before the last backward has gone back and run on
    # rank 0, a tick and a transfer each: no schedule is shorter.
    schedule = _unroll(pattern, (0,), _free(pattern.problem), patient=True)
    assert schedule is not None
    assert violations(schedule) == []
    assert evaluate(schedule).makespan == makespan


def test_models_on_one_rank_take_turns_without_holding_both() -> None:
    # F B of one model and then F B of the other hold one activation for one tick each; F F B B would hold two for two.
    problem = Problem(num_ranks=1, pipelines=(_pipeline("a", (0,), 4), _pipeline("b", (0,), 4)))
    pattern = find_pattern(problem, time_limit_s=120)
    assert pattern is not None
    for number in (0, 1):
        assert pattern.start[Op(number, 0, 0, Kind.B)] - pattern.start[Op(number, 0, 0, Kind.F)] == 1


def test_virtual_stages_keep_the_order_of_messages() -> None:
    pipeline = replace(_pipeline("virtual", (0, 1, 0, 1), 8), forward_ticks=(1, 2, 1, 2), backward_ticks=(2, 1, 3, 1))
    pattern = find_pattern(Problem(num_ranks=2, pipelines=(pipeline,)), time_limit_s=120)
    assert pattern is not None
    _assert_repeats(pattern)
    for ahead in (0, 1, 2):
        schedule = _unroll(pattern, (ahead * pattern.period_ticks,), _free(pattern.problem), patient=False)
        assert schedule is not None
        assert violations(schedule) == []


def test_micro_batches_in_proportion() -> None:
    problem = Problem(num_ranks=2, pipelines=(_pipeline("a", (0, 1), 8), _pipeline("b", (1, 0), 4)))
    pattern = find_pattern(problem, time_limit_s=120)
    assert pattern is not None
    assert pattern.copies == (2, 1)
    assert pattern.period_ticks == 6
    _assert_repeats(pattern)


def test_a_period_of_many_micro_batches_is_none() -> None:
    problem = Problem(num_ranks=2, pipelines=(_pipeline("a", (0, 1), 31), _pipeline("b", (1, 0), 32)))
    assert find_pattern(problem, time_limit_s=120) is None


def test_unrolled_schedules_are_legal() -> None:
    random = Random(8)
    for _ in range(examples(6)):
        problem = random_problem(random, max_ranks=3, max_pipelines=2, max_stages=3, max_micro_batches=2)
        multiples = tuple(replace(p, num_micro_batches=4 * p.num_micro_batches) for p in problem.pipelines)
        problem = replace(problem, pipelines=multiples)
        pattern = find_pattern(problem, time_limit_s=120, seed=random.randrange(99))
        assert pattern is not None
        _assert_repeats(pattern)
        schedules = []
        for patient in (False, True):
            ahead = tuple(random.randint(-3, 3) * pattern.period_ticks for _ in problem.pipelines)
            schedule = _unroll(pattern, ahead, _free(problem), patient=patient)
            assert schedule is not None
            assert violations(schedule) == []
            schedules.append(schedule)
        peaks = evaluate(schedules[0]).peak_bytes
        caps = tuple(random.randint(max(b, p // 2), p) for b, p in zip(problem.initial_bytes, peaks, strict=True))
        capped = _unroll(pattern, ahead, np.array(caps), patient=random.random() < 0.5)
        if capped is not None:
            assert violations(replace(capped, problem=replace(problem, memory_limit_bytes=caps))) == []


def _actor_and_critic(num_ranks: int, num_micro_batches: int) -> Problem:
    return actor_and_critic(
        actor_stages=num_ranks,
        critic_stages=num_ranks,
        actor_microbatches=num_micro_batches,
        critic_microbatches=num_micro_batches,
        actor_forward=2,
        critic_forward=1,
    ).problem


def test_many_micro_batches_come_near_the_bound() -> None:
    problem = _actor_and_critic(8, 64)  # 2,048 operations
    pattern = find_pattern(problem, time_limit_s=600, work_limit=0.5)
    assert pattern is not None
    _assert_repeats(pattern)
    compiled = compile_problem(problem, split=False)
    schedule = shortest_unrolling(pattern, compiled, _free(problem))
    assert schedule is not None
    assert violations(schedule) == []
    as_it_stands = unroll(pattern, compiled, (0, 0), _free(problem))
    assert as_it_stands is not None
    bound, makespan = makespan_lower_bound(problem), evaluate(schedule).makespan
    assert bound <= makespan <= 1.02 * bound
    assert makespan < evaluate(as_it_stands).makespan


def test_the_search_for_a_lead_ends_at_the_target_and_when_told() -> None:
    problem = _actor_and_critic(4, 16)
    pattern = find_pattern(problem, time_limit_s=600, work_limit=0.1)
    assert pattern is not None
    compiled = compile_problem(problem, split=False)
    assert shortest_unrolling(pattern, compiled, _free(problem), should_stop=lambda: True) is None
    first = shortest_unrolling(pattern, compiled, _free(problem), target=10**6)
    assert first == unroll(pattern, compiled, (0, 0), _free(problem))
    too_little = np.zeros(4, np.int64)
    limited = replace(problem, pipelines=tuple(replace(p, activation_bytes=(1,) * 4) for p in problem.pipelines))
    blocked = replace(pattern, problem=limited)
    assert shortest_unrolling(blocked, compile_problem(limited, split=False), too_little) is None
