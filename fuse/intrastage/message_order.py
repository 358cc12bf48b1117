"""In which order each rank computes, sends and receives: its part of one order of everything, which all ranks share.

Operations are ordered by when they end if each takes the schedule's ticks, those that end together by rank. What an
operation needs has ended before it, so this order holds every rank's own, and causes come before effects. A message
comes right after the operation that makes it, so that its receive is posted before whatever the receiver computes
meanwhile; it comes later where two messages that its channel carried before are yet unused, right after the first of
them is used. Either way it comes before the operation that uses it.

Why no ranks ever wait for one another in a circle, on any backend: at a step a rank waits for nothing that comes after
the step in this order. It may wait for the input of the operation, for the peer's part in the message, for the first
message of a group to be set up, for one of its earlier messages to arrive so that there are few at a time, or, as any
CUDA call may, for all of them. So take the first thing in the order that is not finished. All that come before it are;
hence whoever has a part in it has come to it and can take it, whatever it needs is there, and it finishes. That holds
even if every send and every receive blocks until it is through. Tensor-parallel devices walk the same rank's steps, and
meet within operations in the same order.

NCCL wants no more: communicators on one device may be used at once if operations come in one order on all ranks
(its user guide, "Using multiple NCCL communicators concurrently").
"""

from __future__ import annotations

from collections import defaultdict, deque
from enum import Enum, auto
from heapq import heappop, heappush
from typing import NamedTuple

from schedules import Kind, Op, Schedule, evaluate
from schedules.walk import channel_into

MOST_UNUSED = 2
"""Messages that a channel holds for its receiver: one arrives while the one before it is used."""


class Message(NamedTuple):
    """What a stage is sent of a micro-batch, forward or backward; B and I take and make the same ones.

    stage: that receives. An operation at the end of a pipeline has one that nobody sends or receives, too.
    """

    pipeline: int
    stage: int
    micro_batch: int
    is_forward: bool


def message_into(op: Op) -> Message:
    """What the operation takes; not of W, which takes what its I has left."""
    return Message(op.pipeline, op.stage, op.micro_batch, op.kind is Kind.F)


def message_from(op: Op) -> Message:
    """What the operation makes; not of W, which makes none."""
    return Message(op.pipeline, op.stage + (1 if op.kind is Kind.F else -1), op.micro_batch, op.kind is Kind.F)


class Action(Enum):
    """What a rank does about an operation: run it; send what it made; post the receive of what it will need."""

    COMPUTE = auto()
    SEND = auto()
    RECEIVE = auto()


class Step(NamedTuple):
    """What a rank does next; `op` computes, makes what is sent, or uses what is received.

    used: of an operation that computes, what this rank has sent to where its input comes from and what was used there
    before that was made. So it has long arrived once the input is here.
    """

    action: Action
    op: Op
    used: tuple[Message, ...] = ()


def steps_of(schedule: Schedule) -> tuple[tuple[Step, ...], ...]:
    """Every rank's steps through a legal schedule. O(n log n) in all ranks' operations."""
    ends = evaluate(schedule).end
    order = sorted(
        (end, owner, op)
        for owner, (ops, of_owner) in enumerate(zip(schedule.ranks, ends, strict=True))
        for op, end in zip(ops, of_owner, strict=True)
    )
    made = {message_from(op): place for place, (_, _, op) in enumerate(order) if op.kind is not Kind.W}
    after = _messages_after(schedule, order, made)
    steps: list[list[Step]] = [[] for _ in schedule.ranks]
    unused: defaultdict[tuple[int, int], list[tuple[int, Message]]] = defaultdict(list)  # by sender and receiver
    for place, (_, owner, op) in enumerate(order):
        used: list[Message] = []
        if (channel := channel_into(schedule.problem, op)) is not None:
            _, _, source, _ = channel
            sent = unused[owner, source]
            while sent and sent[0][0] <= made[message_into(op)]:
                used.append(heappop(sent)[1])
        steps[owner].append(Step(Action.COMPUTE, op, tuple(used)))
        for made_at, used_at in sorted(after.get(place, ())):
            (_, sender, maker), (_, receiver, user) = order[made_at], order[used_at]
            steps[sender].append(Step(Action.SEND, maker))
            steps[receiver].append(Step(Action.RECEIVE, user))
            heappush(unused[sender, receiver], (used_at, message_into(user)))
    return tuple(map(tuple, steps))


def _messages_after(
    schedule: Schedule, order: list[tuple[int, int, Op]], made: dict[Message, int]
) -> dict[int, list[tuple[int, int]]]:
    """Messages by where in the order what they come after stands: where their maker and their user do."""
    recent: defaultdict[tuple[int, int, bool], deque[int]] = defaultdict(lambda: deque(maxlen=MOST_UNUSED))
    messages: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, (_, _, op) in enumerate(order):
        if channel_into(schedule.problem, op) is None:
            continue
        maker = made[message_into(op)]
        used = recent[op.pipeline, op.stage, op.kind is Kind.F]
        after = max(maker, used[0] if len(used) == MOST_UNUSED else 0)
        messages[after].append((maker, place))
        used.append(place)
    return messages
