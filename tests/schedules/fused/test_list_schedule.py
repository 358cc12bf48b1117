"""Native list scheduling makes the choices of the Python reference, and legal schedules under caps or none."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from schedules import Pipeline, Problem, Schedule, evaluate, violations
from schedules.fused.compiled import compile_problem
from schedules.fused.list_schedule import list_schedule, list_schedule_reference
from schedules.fused.local_search import UNLIMITED_BYTES
from schedules.random_problems import random_problem


@given(st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_native_equals_the_reference(random: Random, patient: bool, limited: bool) -> None:
    problem = random_problem(random, max_forward_only=2)
    compiled = compile_problem(problem, split=False)
    priority = np.array([random.randint(-20, 20) for _ in compiled.ops])
    caps = (UNLIMITED_BYTES,) * problem.num_ranks
    of_op = {op: (int(p), node) for node, (op, p) in enumerate(zip(compiled.ops, priority, strict=True))}
    expected = list_schedule_reference(problem, of_op, caps, patient=patient)
    assert expected is not None
    if limited:
        peaks = evaluate(expected).peak_bytes
        caps = tuple(random.randint(b, p) for b, p in zip(problem.initial_bytes, peaks, strict=True))
        expected = list_schedule_reference(problem, of_op, caps, patient=patient)
    found = list_schedule(compiled, priority, np.array(caps), patient=patient)
    assert found == expected
    if found is not None:
        assert violations(replace(found, problem=replace(problem, memory_limit_bytes=caps))) == []


def test_a_patient_rank_waits_for_what_comes_first() -> None:
    # Rank 1 can start its long forward at once, at tick 0. The other model's result is there at 1 and comes first: a
    # patient rank waits one tick for it.
    first = Pipeline(name="a", ranks=(0, 1), num_micro_batches=1, forward_ticks=(1, 1), backward_ticks=(1, 1))
    second = Pipeline(name="b", ranks=(1,), num_micro_batches=1, forward_ticks=(9,), backward_ticks=(9,))
    problem = Problem(num_ranks=2, pipelines=(first, second))
    compiled = compile_problem(problem, split=False)
    priority = np.array([op.pipeline for op in compiled.ops])
    caps = np.full(2, UNLIMITED_BYTES)

    def models_on_rank_1(schedule: Schedule | None) -> list[int]:
        assert schedule is not None
        return [op.pipeline for op in schedule.ranks[1]]

    assert models_on_rank_1(list_schedule(compiled, priority, caps, patient=True)) == [0, 0, 1, 1]
    assert models_on_rank_1(list_schedule(compiled, priority, caps, patient=False)) == [1, 0, 0, 1]


def test_split_backwards_run_too() -> None:
    halves = Pipeline(
        name="m",
        ranks=(0, 1),
        num_micro_batches=3,
        forward_ticks=(1, 1),
        backward_ticks=(2, 2),
        input_grad_ticks=(1, 1),
        weight_grad_ticks=(1, 1),
    )
    compiled = compile_problem(Problem(num_ranks=2, pipelines=(halves,)), split=True)
    schedule = list_schedule(compiled, np.arange(len(compiled.ops)), np.full(2, UNLIMITED_BYTES), patient=False)
    assert schedule is not None
    assert violations(schedule) == []
