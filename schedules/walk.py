"""What an operation waits for, and an order in which all ranks can run their lists without waiting for ever.

The execution model, shared by the evaluator, the validator and the executor: each rank runs its list in order; an
operation starts when the operations it needs have ended (a receive blocks); what it produces is sent without waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass

from schedules.ir import Kind, Op, Pipeline, Problem, Schedule

# Messages of one pipeline in one direction (forward: True) from one rank to another; each is one FIFO of the executor.
Channel = tuple[int, bool, int, int]


@dataclass(frozen=True, slots=True)
class Blocked:
    """`rank` cannot go past its operation at `index`, which needs `needed`; `needed` is absent or blocked itself."""

    rank: int
    index: int
    op: Op
    needed: Op


@dataclass(frozen=True, slots=True)
class Walk:
    """`steps`: (rank, index) of every operation that can run, dependencies first; `blocked`: where ranks stay stuck."""

    steps: tuple[tuple[int, int], ...]
    blocked: tuple[Blocked, ...]


def needs(schedule_ops: Container[Op], op: Op, problem: Problem) -> tuple[Op, ...]:
    """The operations whose results `op` uses; last what its neighbouring stage makes, where that is one.

    F(s) needs F(s-1), and at the last stage what forward-only pipelines must have said first; B and I(s) need their own
    F and the gradient from stage s+1, which is that stage's I where the schedule has one and its B elsewhere; W needs
    its own I. O(1), at the last stage O(pipelines).
    """
    if op.kind is Kind.W:
        return (_of_same(op, op.stage, Kind.I),)
    if op.kind is Kind.F:
        return problem.first(op) + ((_of_same(op, op.stage - 1, op.kind),) if op.stage else ())
    own = _of_same(op, op.stage, Kind.F)
    if op.stage == problem.pipelines[op.pipeline].num_stages - 1:
        return (own,)
    split = _of_same(op, op.stage + 1, Kind.I)
    return (own, split if split in schedule_ops else _of_same(op, op.stage + 1, Kind.B))


def _of_same(op: Op, stage: int, kind: Kind) -> Op:
    """Of the same micro-batch. Walks make one for every operation, and `replace` would take a third of them."""
    return Op(op.pipeline, stage, op.micro_batch, kind)


def feeds(op: Op, pipeline: Pipeline) -> Op | None:
    """The operation that uses the result of a forward or a whole backward; None at the pipeline's end.

    A forward feeds the next stage's, at the last stage its own backward, if any; a backward feeds the stage before.
    """
    if op.kind is Kind.F:
        if op.stage < pipeline.num_stages - 1:
            return _of_same(op, op.stage + 1, op.kind)
        return None if pipeline.is_forward_only else _of_same(op, op.stage, Kind.B)
    return _of_same(op, op.stage - 1, op.kind) if op.stage else None


def channel_into(problem: Problem, op: Op) -> Channel | None:
    """The stream of messages from which `op` receives; None where its input is on its own rank."""
    ranks = problem.pipelines[op.pipeline].ranks
    source = op.stage - 1 if op.kind is Kind.F else op.stage + 1
    if op.kind is Kind.W or not 0 <= source < len(ranks) or ranks[source] == ranks[op.stage]:
        return None
    return op.pipeline, op.kind is Kind.F, ranks[source], ranks[op.stage]


def channel_from(problem: Problem, op: Op) -> Channel | None:
    """The stream of messages into which `op` sends; None where only its own rank uses what it makes."""
    target = op.stage + 1 if op.kind is Kind.F else op.stage - 1
    if op.kind is Kind.W or not 0 <= target < problem.pipelines[op.pipeline].num_stages:
        return None
    return channel_into(problem, _of_same(op, target, op.kind))


def walk(schedule: Schedule) -> Walk:
    """Run every rank's list as far as it goes. O(operations).

    A list that breaks other rules (operations absent, duplicated or misplaced) is walked as it stands; an operation
    counts as done when its first copy has run.
    """
    problem = schedule.problem
    known = {op for _, op in schedule.ops()}
    done: set[Op] = set()
    next_index = [0] * len(schedule.ranks)
    sleepers: defaultdict[Op, list[int]] = defaultdict(list)
    blocked_on: dict[int, Op] = {}
    steps: list[tuple[int, int]] = []
    awake = list(range(len(schedule.ranks)))
    while awake:
        rank = awake.pop()
        order = schedule.ranks[rank]
        while next_index[rank] < len(order):
            op = order[next_index[rank]]
            waits_for = [n for n in needs(known, op, problem) if n not in done]
            if waits_for:
                blocked_on[rank] = waits_for[0]
                sleepers[waits_for[0]].append(rank)
                break
            steps.append((rank, next_index[rank]))
            next_index[rank] += 1
            done.add(op)
            awake.extend(sleepers.pop(op, ()))
    blocked = tuple(
        Blocked(rank, index, schedule.ranks[rank][index], blocked_on[rank])
        for rank, index in enumerate(next_index)
        if index < len(schedule.ranks[rank])
    )
    return Walk(tuple(steps), blocked)


def wait_cycle(schedule: Schedule, blocked: tuple[Blocked, ...]) -> tuple[Blocked, ...]:
    """The first ranks found waiting for one another, in that order; empty when only absent operations block."""
    rank_of = {op: rank for rank, op in reversed(list(schedule.ops()))}
    stuck = {entry.rank: entry for entry in blocked}
    for first in blocked:
        path: list[Blocked] = []
        entry: Blocked | None = first
        while entry is not None and entry not in path:
            path.append(entry)
            entry = stuck.get(rank_of.get(entry.needed, -1))
        if entry is not None:
            return tuple(path[path.index(entry) :])
    return ()


def describe_cycle(cycle: tuple[Blocked, ...]) -> str:
    """One line: who waits for what."""
    return ", ".join(f"rank {entry.rank} at {entry.op} waits for {entry.needed}" for entry in cycle)
