"""The validator: every rule a schedule breaks, with the rank and operation that break it.

Rules (an operation is named once per rule it breaks):

- unknown: the operation is not of the problem (pipeline, stage or micro-batch out of range, or a half of a backward
  that the pipeline cannot split).
- missing: the operation must be in the schedule and is not. Each stage and micro-batch needs F, and B or both I and W
  unless its pipeline is forward-only.
- duplicate: it stands more than once, or a micro-batch has both B and a half of it.
- placement: it stands on another rank than its stage's.
- dependency: it stands before one that it needs on the same rank.
- deadlock: ranks wait for one another in a circle; the first circle found is reported.
- memory: the operation lifts its rank's memory over the limit.
- message order: two ranks exchange a pipeline's messages in one order at the sender and another at the receiver. NCCL
  matches messages of a communicator by order and ignores tags, and there is one communicator per pipeline and
  direction, so this holds for all messages of a pipeline from one rank to another in one direction, across virtual
  stages too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from schedules.ir import Kind, Op, Schedule
from schedules.timing import memory_levels
from schedules.walk import Channel, channel_from, channel_into, describe_cycle, needs, wait_cycle, walk


class Rule(StrEnum):
    UNKNOWN = "unknown"
    MISSING = "missing"
    DUPLICATE = "duplicate"
    PLACEMENT = "placement"
    DEPENDENCY = "dependency"
    DEADLOCK = "deadlock"
    MEMORY = "memory"
    MESSAGE_ORDER = "message order"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule; `rank` is where the operation stands, or where a missing one belongs."""

    rank: int
    op: Op
    rule: Rule
    message: str

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.op}: {self.rule}: {self.message}"


def check(schedule: Schedule) -> None:
    """Accept a legal schedule.

    Raises:
        ValueError: the schedule breaks a rule; the line names the first three breaches and counts the rest.
    """
    found = violations(schedule)
    if found:
        rest = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError("illegal schedule: " + "; ".join(map(str, found[:3])) + rest)


def violations(schedule: Schedule) -> list[Violation]:
    """Every breach of every rule. O(operations).

    With unknown operations in it nothing else can be judged, so then they are all that is reported.
    """
    return list(_violations(schedule))


@lru_cache(maxsize=4)
def _violations(schedule: Schedule) -> tuple[Violation, ...]:
    """Of the last ones asked for: what finds a schedule, what keeps it and what runs it all ask."""
    unknown = tuple(_unknown(schedule))
    if unknown:
        return unknown
    return (
        *_missing(schedule),
        *_duplicates(schedule),
        *_misplaced(schedule),
        *_dependencies(schedule),
        *_deadlocks(schedule),
        *_memory(schedule),
        *_message_order(schedule),
    )


def _unknown(schedule: Schedule) -> Iterator[Violation]:
    for rank, op in schedule.ops():
        if not schedule.problem.contains(op):
            yield Violation(rank, op, Rule.UNKNOWN, "the problem has no such operation")


def _missing(schedule: Schedule) -> Iterator[Violation]:
    present = {op for _, op in schedule.ops()}
    for number, pipeline in enumerate(schedule.problem.pipelines):
        for stage in range(pipeline.num_stages):
            for micro_batch in range(pipeline.num_micro_batches):
                halves = {kind for kind in (Kind.I, Kind.W) if Op(number, stage, micro_batch, kind) in present}
                for kind in schedule.problem.kinds(number, split=bool(halves)):
                    op = Op(number, stage, micro_batch, kind)
                    if op not in present:
                        yield Violation(pipeline.ranks[stage], op, Rule.MISSING, f"{op} is in no rank's order")


def _duplicates(schedule: Schedule) -> Iterator[Violation]:
    first_rank: dict[Op, int] = {}
    for rank, op in schedule.ops():
        if op in first_rank:
            yield Violation(rank, op, Rule.DUPLICATE, f"it already stands on rank {first_rank[op]}")
        first_rank.setdefault(op, rank)
    for op, rank in first_rank.items():
        if op.kind is Kind.B and (op._replace(kind=Kind.I) in first_rank or op._replace(kind=Kind.W) in first_rank):
            yield Violation(rank, op, Rule.DUPLICATE, "this micro-batch has both a full and a split backward")


def _misplaced(schedule: Schedule) -> Iterator[Violation]:
    for rank, op in schedule.ops():
        if rank != schedule.problem.rank_of(op):
            yield Violation(rank, op, Rule.PLACEMENT, f"its stage is on rank {schedule.problem.rank_of(op)}")


def _dependencies(schedule: Schedule) -> Iterator[Violation]:
    position: dict[Op, tuple[int, int]] = {}
    for rank, order in enumerate(schedule.ranks):
        for index, op in enumerate(order):
            position.setdefault(op, (rank, index))
    for op, (rank, index) in position.items():
        for needed in needs(position, op, schedule.problem):
            needed_rank, needed_index = position.get(needed, (None, 0))
            if needed_rank == rank and needed_index > index:
                yield Violation(rank, op, Rule.DEPENDENCY, f"it needs {needed}, which comes later on this rank")


def _deadlocks(schedule: Schedule) -> Iterator[Violation]:
    cycle = wait_cycle(schedule, walk(schedule).blocked)
    if len(cycle) > 1:  # a rank that waits for itself is a dependency breach
        for entry in cycle:
            yield Violation(entry.rank, entry.op, Rule.DEADLOCK, describe_cycle(cycle))


def _memory(schedule: Schedule) -> Iterator[Violation]:
    limits = schedule.problem.memory_limit_bytes
    if limits is None:
        return
    for rank, (limit, levels) in enumerate(zip(limits, memory_levels(schedule), strict=True)):
        for op, before, after in zip(schedule.ranks[rank], levels, levels[1:], strict=False):
            if after > limit and after > before:
                yield Violation(rank, op, Rule.MEMORY, f"it lifts the rank to {after} bytes of {limit}")


def _message_order(schedule: Schedule) -> Iterator[Violation]:
    """Compare, per channel, the order in which results are produced with the order in which they are used."""
    problem = schedule.problem
    sent: defaultdict[Channel, list[tuple[int, int]]] = defaultdict(list)
    received: defaultdict[Channel, list[tuple[tuple[int, int], int, Op]]] = defaultdict(list)
    for rank, op in schedule.ops():
        outgoing, incoming = channel_from(problem, op), channel_into(problem, op)
        if outgoing is not None:
            sent[outgoing].append((op.stage + 1 if op.kind is Kind.F else op.stage - 1, op.micro_batch))
        if incoming is not None:
            received[incoming].append(((op.stage, op.micro_batch), rank, op))
    for channel, uses in received.items():
        for message, (wanted, rank, op) in zip(sent[channel], uses, strict=False):
            if message != wanted:
                stage, micro_batch = message
                reason = f"rank {channel[2]} sends micro-batch {micro_batch} to stage {stage} where this is received"
                yield Violation(rank, op, Rule.MESSAGE_ORDER, reason)
