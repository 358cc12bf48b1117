"""Ranks' steps of any legal schedule: in one order, so that no circle can close, and receives as early as they help."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from fuse.intrastage.message_order import MOST_UNUSED, Action, Message, Step, message_into, steps_of
from schedules import Kind, Op, Pipeline, Problem, Schedule, evaluate
from schedules.baselines import gpipe, one_f_one_b
from schedules.random_problems import random_problem, random_schedule
from schedules.walk import channel_from, channel_into

from ..examples import examples

SEEDS = range(examples(30))


def drawn(seed: int) -> Schedule:
    random = Random(seed)
    return random_schedule(random_problem(random, max_ranks=8, max_stages=6, max_micro_batches=8), random)


def message_of(step: Step) -> Message:
    """The same for a send and its receive."""
    op, is_forward = step.op, step.op.kind is Kind.F
    further = 0 if step.action is Action.RECEIVE else 1 if is_forward else -1
    return Message(op.pipeline, op.stage + further, op.micro_batch, is_forward)


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_come_through_where_every_message_blocks_both_ends(seed: int) -> None:
    schedule = drawn(seed)
    left = [list(steps) for steps in steps_of(schedule)]
    received: set[Message] = set()
    progress = True
    while progress:
        progress = False
        heads = {rank: steps[0] for rank, steps in enumerate(left) if steps}
        for rank, step in heads.items():
            if step.action is Action.COMPUTE:
                into = message_of(Step(Action.RECEIVE, step.op))
                assert channel_into(schedule.problem, step.op) is None or into in received
                left[rank].pop(0)
                progress = True
            elif step.action is Action.SEND:
                for peer, other in heads.items():
                    if other.action is Action.RECEIVE and message_of(other) == message_of(step):
                        left[rank].pop(0)
                        left[peer].pop(0)
                        received.add(message_of(step))
                        progress = True
    assert not any(left)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_operation_is_a_step_and_each_message_one_of_both_its_ends(seed: int) -> None:
    schedule = drawn(seed)
    for rank, steps in enumerate(steps_of(schedule)):
        ops = schedule.ranks[rank]
        assert tuple(step.op for step in steps if step.action is Action.COMPUTE) == ops
        sent = Counter(step.op for step in steps if step.action is Action.SEND)
        assert sent == Counter(op for op in ops if channel_from(schedule.problem, op) is not None)
        taken = Counter(step.op for step in steps if step.action is Action.RECEIVE)
        assert taken == Counter(op for op in ops if channel_into(schedule.problem, op) is not None)


@pytest.mark.parametrize("seed", SEEDS)
def test_few_messages_wait_unused_at_a_receiver(seed: int) -> None:
    for steps in steps_of(drawn(seed)):
        unused = Counter[tuple[int, int, bool]]()
        for step in steps:
            channel = step.op.pipeline, step.op.stage, step.op.kind is Kind.F
            if step.action is Action.RECEIVE:
                unused[channel] += 1
                assert unused[channel] <= MOST_UNUSED
            elif step.action is Action.COMPUTE and step.op.kind is not Kind.W and unused[channel]:
                unused[channel] -= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_receive_is_posted_before_what_is_computed_while_its_message_is_sent(seed: int) -> None:
    """But for those that wait for messages before them to be used."""
    schedule = drawn(seed)
    timing = evaluate(schedule)
    ends = {
        op: end
        for ops, of_rank in zip(schedule.ranks, timing.end, strict=True)
        for op, end in zip(ops, of_rank, strict=True)
    }
    makers = {message_of(Step(Action.SEND, op)): op for op in ends if channel_from(schedule.problem, op) is not None}
    for steps in steps_of(schedule):
        computed: list[Op] = []
        for step in steps:
            if step.action is Action.COMPUTE:
                computed.append(step.op)
            elif step.action is Action.RECEIVE:
                sent_at = ends[makers[message_of(step)]]
                late = [op for op in computed if ends[op] > sent_at]
                channel = [op for op in computed if message_of(Step(Action.RECEIVE, op))[:2] == message_of(step)[:2]]
                assert not late or late[-1] in channel


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_sent_is_used_for_certain_once_a_later_input_comes_from_there(seed: int) -> None:
    """By the order of the rank that the input comes from: all it has used before it made that, and nothing else."""
    schedule = drawn(seed)
    problem = schedule.problem
    makers = {
        message_of(Step(Action.SEND, op)): op for _, op in schedule.ops() if channel_from(problem, op) is not None
    }
    for rank, steps in enumerate(steps_of(schedule)):
        sent: set[Message] = set()
        for action, op, used in steps:
            if action is Action.SEND:
                sent.add(message_of(Step(action, op)))
            channel = channel_into(problem, op)
            if action is not Action.COMPUTE or channel is None:
                assert not used
                continue
            peer = schedule.ranks[channel[2]]
            before = peer[: 1 + peer.index(makers[message_into(op)])]
            known = {message_into(one) for one in before if (into := channel_into(problem, one)) and into[2] == rank}
            assert set(used) == sent & known
            assert len(used) == len(set(used))
            sent -= known


def pipeline_of(num_ranks: int, num_micro_batches: int) -> Problem:
    pipeline = Pipeline(
        name="actor",
        ranks=tuple(range(num_ranks)),
        num_micro_batches=num_micro_batches,
        forward_ticks=(1,) * num_ranks,
        backward_ticks=(2,) * num_ranks,
    )
    return Problem(num_ranks=num_ranks, pipelines=(pipeline,))


def written(schedule: Schedule) -> list[str]:
    """What a reader would write: ! sends what is made, ? receives what will be used."""
    marks = {Action.COMPUTE: "", Action.SEND: "!", Action.RECEIVE: "?"}
    return [
        " ".join(f"{marks[step.action]}{step.op.kind}{step.op.micro_batch}" for step in steps)
        for steps in steps_of(schedule)
    ]


def test_the_steps_of_1f1b() -> None:
    assert written(one_f_one_b(pipeline_of(2, 3))) == [
        "F0 !F0 F1 !F1 ?B0 B0 F2 !F2 ?B1 B1 ?B2 B2",
        "?F0 ?F1 F0 B0 !B0 F1 ?F2 B1 !B1 F2 B2 !B2",
    ]


def test_messages_to_a_slow_stage_are_sent_as_it_uses_those_before() -> None:
    problem = pipeline_of(2, 4)
    (pipeline,) = problem.pipelines
    slow = replace(problem, pipelines=(replace(pipeline, forward_ticks=(1, 4)),))
    assert written(gpipe(slow))[0].startswith("F0 !F0 F1 !F1 F2 F3 !F2 !F3")
