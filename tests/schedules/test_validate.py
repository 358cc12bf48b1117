"""Legal schedules pass; every kind of corruption is found, with its rank, operation and rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schedules import Kind, Op, Pipeline, Problem, Rule, Schedule, check, evaluate, violations
from schedules.random_problems import random_problem, random_schedule

Corruption = Callable[[Schedule, Random], tuple[Schedule, Rule, int, Op] | None]

PIPELINE = Pipeline(
    name="actor",
    ranks=(0, 1),
    num_micro_batches=2,
    forward_ticks=(1, 1),
    backward_ticks=(2, 2),
    activation_bytes=(3, 3),
)
PROBLEM = Problem(num_ranks=2, pipelines=(PIPELINE,))


def _ops(text: str) -> tuple[Op, ...]:
    return tuple(map(Op.parse, text.split()))


def _schedule(*orders: str, problem: Problem = PROBLEM) -> Schedule:
    return Schedule(problem, tuple(map(_ops, orders)))


def _found(schedule: Schedule) -> set[tuple[int, str, str]]:
    return {(v.rank, str(v.op), str(v.rule)) for v in violations(schedule)}


@given(st.randoms(use_true_random=False))
def test_any_generated_schedule_is_legal(random: Random) -> None:
    schedule = random_schedule(random_problem(random, max_forward_only=2), random)
    assert violations(schedule) == []
    check(schedule)


def _pick(schedule: Schedule, random: Random) -> tuple[int, int, Op]:
    places = [(r, i) for r, order in enumerate(schedule.ranks) for i in range(len(order))]
    rank, index = random.choice(places)
    return rank, index, schedule.ranks[rank][index]


def _with_order(schedule: Schedule, rank: int, order: tuple[Op, ...]) -> Schedule:
    return replace(schedule, ranks=tuple(order if r == rank else old for r, old in enumerate(schedule.ranks)))


def _drop(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    rank, index, op = _pick(schedule, random)
    order = schedule.ranks[rank]
    return _with_order(schedule, rank, order[:index] + order[index + 1 :]), Rule.MISSING, rank, op


def _repeat(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    rank, _, op = _pick(schedule, random)
    at = random.randint(0, len(schedule.ranks[rank]))
    order = schedule.ranks[rank]
    return _with_order(schedule, rank, (*order[:at], op, *order[at:])), Rule.DUPLICATE, rank, op


def _move_to_another_rank(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    if schedule.problem.num_ranks == 1:
        return None
    rank, index, op = _pick(schedule, random)
    other = random.choice([r for r in range(schedule.problem.num_ranks) if r != rank])
    order = schedule.ranks[rank]
    moved = _with_order(schedule, rank, order[:index] + order[index + 1 :])
    at = random.randint(0, len(moved.ranks[other]))
    order = moved.ranks[other]
    return _with_order(moved, other, (*order[:at], op, *order[at:])), Rule.PLACEMENT, other, op


def _use_before_making(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    """Put a backward before its own forward."""
    rank, index, op = _pick(schedule, random)
    if op.kind not in (Kind.B, Kind.I):
        return None
    order = schedule.ranks[rank]
    at = order.index(op._replace(kind=Kind.F))
    return (
        _with_order(schedule, rank, (*order[:at], op, *order[at:index], *order[index + 1 :])),
        Rule.DEPENDENCY,
        rank,
        op,
    )


def _overrun_memory(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    """Lower a rank's limit to one byte below its peak."""
    peaks = evaluate(schedule).peak_bytes
    initial = schedule.problem.initial_bytes
    ranks = [rank for rank, peak in enumerate(peaks) if peak > initial[rank]]
    if not ranks:
        return None
    rank = random.choice(ranks)
    limits = tuple(peak - (r == rank) for r, peak in enumerate(peaks))
    problem = replace(schedule.problem, memory_limit_bytes=limits)
    level = initial[rank]
    for op in schedule.ranks[rank]:
        level += problem.bytes_taken(op)
        if level == peaks[rank]:
            return Schedule(problem, schedule.ranks), Rule.MEMORY, rank, op
    raise AssertionError("the peak is somewhere")


def _invent(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    rank, _, op = _pick(schedule, random)
    pipeline = schedule.problem.pipelines[op.pipeline]
    strange = random.choice(
        [
            op._replace(pipeline=len(schedule.problem.pipelines)),
            op._replace(stage=pipeline.num_stages),
            op._replace(micro_batch=pipeline.num_micro_batches),
        ]
    )
    return _with_order(schedule, rank, (*schedule.ranks[rank], strange)), Rule.UNKNOWN, rank, strange


def _deadlock(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    """Stage 0 takes micro-batch 0 back before it forwards micro-batch 1; stage 1 does so after."""
    candidates = [
        (number, pipeline.ranks[:2])
        for number, pipeline in enumerate(schedule.problem.pipelines)
        if pipeline.num_stages > 1
        and pipeline.num_micro_batches > 1
        and pipeline.ranks[0] != pipeline.ranks[1]
        and not pipeline.is_forward_only
    ]
    if not candidates:
        return None
    number, ranks = random.choice(candidates)
    changed = schedule
    for stage, rank in enumerate(ranks):
        order = list(changed.ranks[rank])
        forward = Op(number, stage, 1, Kind.F)
        backward = Op(number, stage, 0, Kind.B if Op(number, stage, 0, Kind.B) in order else Kind.I)
        moved, after = (forward, backward) if stage == 0 else (backward, forward)
        if order.index(moved) < order.index(after):
            order.remove(moved)
            order.insert(order.index(after) + 1, moved)
        changed = _with_order(changed, rank, tuple(order))
    breach = next((v for v in violations(changed) if v.rule is Rule.DEADLOCK), None)
    if breach is None:  # a rank that waits for itself came first
        assert any(v.rule is Rule.DEPENDENCY for v in violations(changed))
        return None
    return changed, Rule.DEADLOCK, breach.rank, breach.op


def _swap_messages(schedule: Schedule, random: Random) -> tuple[Schedule, Rule, int, Op] | None:
    """Let the sender make micro-batch 1 before micro-batch 0 while the receiver keeps its order."""
    for number, pipeline in enumerate(schedule.problem.pipelines):
        if pipeline.num_stages > 1 and pipeline.num_micro_batches > 1 and pipeline.ranks.count(pipeline.ranks[0]) == 1:
            first, second = Op(number, 0, 0, Kind.F), Op(number, 0, 1, Kind.F)
            swap = {first: second, second: first}
            rank = pipeline.ranks[0]
            order = tuple(swap.get(op, op) for op in schedule.ranks[rank])
            receiver = pipeline.ranks[1]
            return _with_order(schedule, rank, order), Rule.MESSAGE_ORDER, receiver, Op(number, 1, 0, Kind.F)
    return None


@pytest.mark.parametrize(
    "corrupt",
    [
        _drop,
        _repeat,
        _move_to_another_rank,
        _use_before_making,
        _overrun_memory,
        _invent,
        _deadlock,
        _swap_messages,
    ],
)
@given(random=st.randoms(use_true_random=False))
def test_every_corruption_is_found(corrupt: Corruption, random: Random) -> None:
    schedule = random_schedule(random_problem(random, max_forward_only=2), random)
    corrupted = corrupt(schedule, random)
    assume(corrupted is not None)
    assert corrupted is not None
    changed, rule, rank, op = corrupted
    kinds = {Kind.B: (Kind.B, Kind.I), Kind.I: (Kind.B, Kind.I)} if rule is Rule.MISSING else {}
    found = {(v.rule, v.rank, v.op) for v in violations(changed)}
    expected = {(rule, rank, op._replace(kind=kind)) for kind in kinds.get(op.kind, (op.kind,))}
    assert found & expected
    with pytest.raises(ValueError, match="illegal schedule") as error:
        check(changed)
    assert "\n" not in str(error.value)


def test_a_wait_circle_names_both_ranks() -> None:
    # Rank 0 waits for B0.1.0 before it makes F0.0.1; rank 1 waits for F0.0.1's result before it makes B0.1.0.
    found = violations(_schedule("F0.0.0 B0.0.0 F0.0.1 B0.0.1", "F0.1.0 F0.1.1 B0.1.0 B0.1.1"))
    assert {(v.rank, str(v.op), v.rule) for v in found} == {(0, "B0.0.0", "deadlock"), (1, "F0.1.1", "deadlock")}
    assert "rank 0 at B0.0.0 waits for B0.1.0, rank 1 at F0.1.1 waits for F0.0.1" in str(found[0])


def test_backwards_in_another_order_than_their_sender() -> None:
    found = _found(_schedule("F0.0.0 F0.0.1 B0.0.1 B0.0.0", "F0.1.0 F0.1.1 B0.1.0 B0.1.1"))
    assert found == {(0, "B0.0.1", "message order"), (0, "B0.0.0", "message order")}


def test_virtual_stages_share_their_ranks_channel() -> None:
    # Stages 0, 2 on rank 0 and 1, 3 on rank 1: F0.0.1 and F0.2.0 both send from rank 0 to rank 1.
    ones = (1, 1, 1, 1)
    pipeline = Pipeline(name="v", ranks=(0, 1, 0, 1), num_micro_batches=2, forward_ticks=ones, backward_ticks=ones)
    problem = replace(PROBLEM, pipelines=(pipeline,))
    backwards = " B0.{}.0 B0.{}.1 B0.{}.0 B0.{}.1"
    rank0 = "F0.0.0 F0.0.1 F0.2.0 F0.2.1" + backwards.format(2, 2, 0, 0)
    rank1 = "F0.1.0 F0.1.1 F0.3.0 F0.3.1" + backwards.format(3, 3, 1, 1)
    assert violations(_schedule(rank0, rank1, problem=problem)) == []
    swapped = "F0.1.0 F0.3.0 F0.1.1 F0.3.1" + backwards.format(3, 3, 1, 1)
    found = _found(_schedule(rank0, swapped, problem=problem))
    assert {(1, "F0.3.0", "message order"), (1, "F0.1.1", "message order")} <= found


def test_full_and_split_backward_of_one_micro_batch() -> None:
    pipeline = replace(PIPELINE, num_micro_batches=1, input_grad_ticks=(1, 1), weight_grad_ticks=(1, 1))
    problem = replace(PROBLEM, pipelines=(pipeline,))
    found = _found(_schedule("F0.0.0 B0.0.0", "F0.1.0 B0.1.0 I0.1.0 W0.1.0", problem=problem))
    assert (1, "B0.1.0", "duplicate") in found


def test_a_half_of_a_backward_that_cannot_be_split() -> None:
    assert _found(_schedule("I0.0.0", "")) == {(0, "I0.0.0", "unknown")}


def test_check_counts_what_it_does_not_name() -> None:
    with pytest.raises(ValueError, match=r"rank 0, F0\.0\.0: missing: .*; and 5 more"):
        check(_schedule("", ""))
