"""List scheduling by priorities: an idle rank runs the ready operation that comes first. Native, and its reference."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from schedules import _native
from schedules.fused.compiled import Compiled
from schedules.ir import Kind, Op, Problem, Schedule
from schedules.walk import Channel, channel_from, channel_into, feeds


def list_schedule(
    compiled: Compiled, priority: NDArray[np.int64], caps: NDArray[np.int64], *, patient: bool
) -> Schedule | None:
    """Each idle rank runs the ready operation with the smallest priority, of equals that of the smaller node.

    None when the ranks block one another under the caps. O(operations * (chains per rank + log operations)).

    Args:
        priority: of every node of the compiled problem.
        caps: bytes per rank.
        patient: whether a rank waits for an operation of smaller priority that is on its way and arrives before the
            ready one would end.
    """
    orders = _native.list_schedule(compiled.graph, priority, caps, patient)
    return None if orders is None else compiled.schedule(orders)


def list_schedule_reference(
    problem: Problem, priority: Mapping[Op, tuple[int, int]], caps: tuple[int, ...], *, patient: bool
) -> Schedule | None:
    """The same in Python, of forwards and full backwards; no two operations have the same priority."""
    chains: list[list[tuple[int, int, Kind]]] = [[] for _ in range(problem.num_ranks)]
    for number, pipeline in enumerate(problem.pipelines):
        for stage, rank in enumerate(pipeline.ranks):
            chains[rank] += [(number, stage, kind) for kind in problem.kinds(number, split=False)]
    done: defaultdict[tuple[int, int, Kind], int] = defaultdict(int)
    arrival = {op: 0 for op in priority if op.stage == 0 and op.kind is Kind.F}
    under_way: defaultdict[Channel, deque[Op]] = defaultdict(deque)
    orders: list[list[Op]] = [[] for _ in range(problem.num_ranks)]
    free_at, held = [0] * problem.num_ranks, list(problem.initial_bytes)
    events = [(0, rank) for rank in range(problem.num_ranks)]

    def choose(rank: int, now: int) -> Op | None:
        candidates = []
        for number, stage, kind in chains[rank]:
            op = Op(number, stage, done[number, stage, kind], kind)
            if op not in arrival or (kind is Kind.F and held[rank] + problem.bytes_taken(op) > caps[rank]):
                continue
            if any(done[one.pipeline, one.stage, one.kind] <= op.micro_batch for one in problem.first(op)):
                continue
            channel = channel_into(problem, op)
            if channel is None or under_way[channel][0] == op:
                candidates.append((priority[op], op))
        ready = min((candidate for candidate in candidates if arrival[candidate[1]] <= now), default=None)
        if ready is None:
            return None
        end = now + problem.ticks(ready[1])
        waits = patient and any(candidate < ready and arrival[candidate[1]] < end for candidate in candidates)
        return None if waits else ready[1]

    def run(op: Op, rank: int, now: int) -> None:
        end = now + problem.ticks(op)
        orders[rank].append(op)
        free_at[rank] = end
        held[rank] += problem.bytes_taken(op)
        done[op.pipeline, op.stage, op.kind] += 1
        heapq.heappush(events, (end, rank))
        incoming, outgoing = channel_into(problem, op), channel_from(problem, op)
        if incoming is not None:
            under_way[incoming].popleft()
        fed = feeds(op, problem.pipelines[op.pipeline])
        if fed is not None:
            if outgoing is not None:
                under_way[outgoing].append(fed)
            arrival[fed] = end + problem.transfer_ticks(op, fed)
            heapq.heappush(events, (arrival[fed], problem.rank_of(fed)))

    while events:
        now, rank = heapq.heappop(events)
        if free_at[rank] <= now:
            op = choose(rank, now)
            if op is not None:
                run(op, rank, now)
    return Schedule(problem, tuple(map(tuple, orders))) if sum(map(len, orders)) == len(priority) else None
