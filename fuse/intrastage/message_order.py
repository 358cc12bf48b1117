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
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache

from schedules import Kind, Op, Schedule, evaluate
from schedules.walk import channel_into, needs

MOST_UNUSED = 2
"""Messages that a channel holds for its receiver: one arrives while the one before it is used."""


class Action(Enum):
    """What a rank does about an operation: run it; send what it made; post the receive of what it will need."""

    COMPUTE = auto()
    SEND = auto()
    RECEIVE = auto()


@dataclass(frozen=True, slots=True)
class Step:
    """What a rank does next; `op` computes, makes what is sent, or uses what is received."""

    action: Action
    op: Op


@lru_cache(maxsize=8)
def rank_steps(schedule: Schedule, rank: int) -> tuple[Step, ...]:
    """A rank's steps through a legal schedule. O(n log n) in all ranks' operations."""
    ends = evaluate(schedule).end
    order = sorted(
        (end, owner, op)
        for owner, (ops, of_owner) in enumerate(zip(schedule.ranks, ends, strict=True))
        for op, end in zip(ops, of_owner, strict=True)
    )
    messages = _messages_after(schedule, {op: position for position, (_, _, op) in enumerate(order)})
    steps: list[Step] = []
    for position, (_, owner, op) in enumerate(order):
        if owner == rank:
            steps.append(Step(Action.COMPUTE, op))
        for _, maker, user in sorted(messages.get(position, ())):
            if schedule.problem.rank_of(maker) == rank:
                steps.append(Step(Action.SEND, maker))
            if schedule.problem.rank_of(user) == rank:
                steps.append(Step(Action.RECEIVE, user))
    return tuple(steps)


def _messages_after(schedule: Schedule, positions: dict[Op, int]) -> dict[int, list[tuple[int, Op, Op]]]:
    """Messages by the position of the operation that they come after: the maker's position, maker and user of each."""
    used: defaultdict[tuple[int, int, bool], deque[int]] = defaultdict(lambda: deque(maxlen=MOST_UNUSED))
    messages: defaultdict[int, list[tuple[int, Op, Op]]] = defaultdict(list)
    for user in sorted(positions, key=positions.__getitem__):
        if channel_into(schedule.problem, user) is None:
            continue
        maker = needs(positions, user, schedule.problem)[-1]
        last_used = used[user.pipeline, user.stage, user.kind is Kind.F]
        after = max(positions[maker], last_used[0] if len(last_used) == MOST_UNUSED else 0)
        messages[after].append((positions[maker], maker, user))
        last_used.append(positions[user])
    return messages
