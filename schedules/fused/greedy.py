"""Greedy list scheduling: an idle rank runs the ready operation that the rest of the schedule waits for most."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from dataclasses import dataclass, replace

from schedules.bounds import check_feasible, heads_and_tails
from schedules.ir import Kind, Op, Problem, Schedule
from schedules.walk import Channel, channel_from, channel_into, feeds


@dataclass(frozen=True, slots=True)
class _Chain:
    """The forwards or the backwards of one stage, in micro-batch order, with least ticks from end to makespan."""

    pipeline: int
    stage: int
    kind: Kind
    tails: tuple[int, ...]


def greedy(problem: Problem) -> Schedule:
    """Backwards before forwards, then the longest tail first; a forward only where its activation fits.

    Under a tight limit the models can block one another, each holding memory the other waits for. Then the construction
    is repeated with admission: a micro-batch starts only when its activations fit on all of its ranks beside those of
    all micro-batches under way, which cannot block. O(operations * chains per rank).

    Raises:
        ValueError: a rank's limit is too small for any schedule.

    Source: Zhong et al., RLHFuse, arXiv 2409.13221, section 5 (the search's initial state); priorities by tail and
    admission are ours.
    """
    check_feasible(problem)
    return _construct(problem, admission=False) or _admitted(problem)


def _admitted(problem: Problem) -> Schedule:
    schedule = _construct(problem, admission=True)
    assert schedule is not None, "admitted micro-batches always come through"
    return schedule


def _construct(problem: Problem, *, admission: bool) -> Schedule | None:
    """Simulate time from event to event; None when all ranks wait for memory."""
    chains = _chains_by_rank(problem)
    next_micro_batch: dict[tuple[int, int, Kind], int] = {}
    arrival: dict[Op, int] = {Op(p, 0, 0, Kind.F): 0 for p in range(len(problem.pipelines))}
    orders: list[list[Op]] = [[] for _ in range(problem.num_ranks)]
    free_at = [0] * problem.num_ranks
    held = list(problem.initial_bytes)
    reserved = list(problem.initial_bytes)
    limits = problem.memory_limit_bytes
    under_way: defaultdict[Channel, deque[Op]] = defaultdict(deque)
    per_micro_batch = [_bytes_per_micro_batch(problem, p) for p in range(len(problem.pipelines))]
    num_left = sum(len(chain.tails) for of_rank in chains for chain in of_rank)
    events = [(0, rank) for rank in range(problem.num_ranks)]  # when a rank may begin something

    def fits(op: Op, rank: int) -> bool:
        if limits is None or op.kind is not Kind.F:
            return True
        if not admission:
            return held[rank] + problem.bytes_taken(op) <= limits[rank]
        return op.stage > 0 or all(reserved[r] + b <= limits[r] for r, b in per_micro_batch[op.pipeline].items())

    def has_what_is_first(op: Op) -> bool:
        done = (next_micro_batch.get((one.pipeline, one.stage, one.kind), 0) for one in problem.first(op))
        return all(count > op.micro_batch for count in done)

    def is_next_message(op: Op) -> bool:
        channel = channel_into(problem, op)
        return channel is None or under_way[channel][0] == op

    def run(op: Op, rank: int, now: int) -> None:
        pipeline = problem.pipelines[op.pipeline]
        end = now + problem.ticks(op)
        orders[rank].append(op)
        free_at[rank] = end
        held[rank] += problem.bytes_taken(op)
        next_micro_batch[op.pipeline, op.stage, op.kind] = op.micro_batch + 1
        sign = 1 if (op.kind, op.stage) == (Kind.F, 0) else -1 if (op.kind, op.stage) == (Kind.B, 0) else 0
        for r, num_bytes in per_micro_batch[op.pipeline].items():
            reserved[r] += sign * num_bytes
        heapq.heappush(events, (end, rank))
        if op.kind is Kind.F and op.stage == 0 and op.micro_batch + 1 < pipeline.num_micro_batches:
            arrival[op._replace(micro_batch=op.micro_batch + 1)] = end
        incoming, outgoing = channel_into(problem, op), channel_from(problem, op)
        if incoming is not None:
            under_way[incoming].popleft()
        fed = feeds(op, pipeline)
        if fed is not None:
            if outgoing is not None:
                under_way[outgoing].append(fed)
            arrival[fed] = end + problem.transfer_ticks(op, fed)
            heapq.heappush(events, (arrival[fed], problem.rank_of(fed)))

    while num_left:
        if not events:
            return None
        now, first = heapq.heappop(events)
        awake = {first}
        while events and events[0][0] == now:
            awake.add(heapq.heappop(events)[1])
        for rank in range(problem.num_ranks) if admission else sorted(awake):  # what one gives back, others may take
            if free_at[rank] > now:
                continue
            ready = []
            for chain in chains[rank]:
                micro_batch = next_micro_batch.get((chain.pipeline, chain.stage, chain.kind), 0)
                op = Op(chain.pipeline, chain.stage, micro_batch, chain.kind)
                is_here = arrival.get(op, now + 1) <= now and is_next_message(op)
                if is_here and fits(op, rank) and has_what_is_first(op):
                    ready.append((chain.kind is Kind.F, -chain.tails[micro_batch], op))
            if ready:
                run(min(ready)[2], rank, now)
                num_left -= 1
    return Schedule(problem, tuple(map(tuple, orders)))


def _chains_by_rank(problem: Problem) -> list[list[_Chain]]:
    chains: list[list[_Chain]] = [[] for _ in range(problem.num_ranks)]
    _, tails = heads_and_tails(replace(problem, memory_limit_bytes=None))
    for number, (pipeline, tail) in enumerate(zip(problem.pipelines, tails, strict=True)):
        for stage, rank in enumerate(pipeline.ranks):
            chains[rank].append(_Chain(number, stage, Kind.F, tuple(tail.forward[stage].tolist())))
            if not pipeline.is_forward_only:
                chains[rank].append(_Chain(number, stage, Kind.B, tuple(tail.backward[stage].tolist())))
    return chains


def _bytes_per_micro_batch(problem: Problem, number: int) -> dict[int, int]:
    needed: dict[int, int] = {}
    pipeline = problem.pipelines[number]
    for stage, rank in enumerate(pipeline.ranks):
        needed[rank] = needed.get(rank, 0) + pipeline.activation_bytes[stage]
    return needed
