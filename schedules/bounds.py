r"""Lower bounds on makespan and on peak memory, each with its proof.

**Relaxation.** A backward that can be split is replaced by a part that others wait for, x = min(b, i) ticks, and a rest
of min(b, i + w) - x ticks that nothing waits for. Run as B it occupies its rank for b >= both parts and releases its
gradient after b >= x; run as I and W likewise: every schedule of the problem is one of the relaxation. A backward that
cannot be split is x = b with no rest.

**Order.** Micro-batches of a pipeline are alike, so some optimal schedule runs each chain (the forwards, or the
backwards, of one stage) in micro-batch order: replace the micro-batch numbers of a chain by their ranks in time. The
j-th earliest forward at stage s starts after the j-th earliest at stage s - 1 has ended, since j of them have; likewise
backwards. Kinds and times stay, hence memory and makespan.

**Heads** (earliest starts) are the least solution of, for every stage and micro-batch,

    F_j(s)   >= F_j(s-1) + f(s-1) + transfer        F_j(s) >= F_{j-1}(s) + f
    B_j(s)   >= B_j(s+1) + x(s+1) + transfer        B_j(s) >= B_{j-1}(s) + x        B_j(last) >= F_j(last) + f
    B_j      >= F_k + (j-k+1) f + (j-k) x           for k <= j: F_k..F_j and B_k..B_{j-1} run on one rank before B_j

and, where at most K micro-batches of the stage fit into the rank's memory (*counting*: F_{j+K} starts after B_j has
ended, or K + 1 activations would be held at once),

    F_{j+K}  >= B_j + x
    F_j      >= F_k + (j-k) f + (j-K-k+1) x         for k <= j - K: F_k..F_{j-1} and B_k..B_{j-K} run before F_j

A **forward-only** pipeline q has the inequalities of its forwards alone. Where it comes before the last stage of p,

    F_j of p >= F_k of q + (j-k+1) f of q + (j-k) f of p      for k <= j: F_k..F_j of q and F_k..F_{j-1} of p run before

on that stage's rank. (The order above holds for both: before the j-th earliest F of p, j of q have ended.)

**Tails** (ticks between an operation's end and the schedule's) are heads of the mirrored problem: time runs backwards,
forwards and backwards change places, so do the first and last micro-batch, and the counting rule maps to itself.

**Rank bound.** On one rank every operation has a head, a duration and a tail; the shortest preemptive schedule of them
(Jackson's rule: run the released operation with the longest tail) ends no later than any schedule's makespan.

**Memory at a makespan.** If the makespan bound under the limit c on every rank exceeds T, no schedule as short as T has
a peak of c or less. The bound falls as c grows, so bisection finds the smallest c that is not excluded.

Sources: Carlier, The one-machine sequencing problem, EJOR 11 (1982), for the rank bound.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from schedules.ir import Pipeline, Problem

Ticks = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Heads:
    """Earliest starts of one pipeline, [stages, micro-batches], ticks; backwards are [stages, 0] where it has none."""

    forward: Ticks
    backward: Ticks


def makespan_lower_bound(problem: Problem) -> int:
    """No legal schedule of the problem is shorter. O(operations * log operations), some rounds of it under a limit.

    Raises:
        ValueError: a rank's limit is too small for any schedule.
    """
    check_feasible(problem)
    heads, tails = heads_and_tails(problem)
    jobs: list[list[tuple[int, int, int]]] = [[] for _ in range(problem.num_ranks)]
    for pipeline, head, tail in zip(problem.pipelines, heads, tails, strict=True):
        for stage, rank in enumerate(pipeline.ranks):
            forward_ticks = pipeline.forward_ticks[stage]
            for start, after in zip(head.forward[stage].tolist(), tail.forward[stage].tolist(), strict=True):
                jobs[rank].append((start, forward_ticks, after))
            if pipeline.is_forward_only:
                continue
            waited_ticks = gradient_ticks(pipeline, stage)
            rest_ticks = backward_work_ticks(pipeline, stage) - waited_ticks
            for micro_batch in range(pipeline.num_micro_batches):
                start = int(head.backward[stage, micro_batch])
                after = max(int(tail.backward[stage, micro_batch]), rest_ticks)
                jobs[rank].append((start, waited_ticks, after))
                if rest_ticks:
                    jobs[rank].append((start + waited_ticks, rest_ticks, 0))
    return max(map(preemptive_makespan, jobs))


def peak_memory_lower_bound(problem: Problem, makespan: int) -> int:
    """No legal schedule of at most `makespan` ticks has a smaller peak (bytes, the largest of all ranks).

    Limits of the problem itself are left out: they do not make a peak smaller. O(makespan bound * log bytes).

    Raises:
        ValueError: no schedule is as short as `makespan`.
    """
    free = replace(problem, memory_limit_bytes=None)
    if makespan_lower_bound(free) > makespan:
        raise ValueError(f"no schedule takes {makespan} ticks; the least is {makespan_lower_bound(free)}")
    excluded = max(smallest_limits(problem)) - 1
    possible = max(
        initial + sum(p.num_micro_batches * p.activation_bytes[s] for p in problem.pipelines for s in _stages(p, rank))
        for rank, initial in enumerate(problem.initial_bytes)
    )
    possible = max(possible, excluded + 1)
    while possible - excluded > 1:
        limit = (possible + excluded) // 2
        if makespan_lower_bound(replace(problem, memory_limit_bytes=(limit,) * problem.num_ranks)) > makespan:
            excluded = limit
        else:
            possible = limit
    return possible


def smallest_limits(problem: Problem) -> tuple[int, ...]:
    """Per rank, the smallest memory limit (bytes) under which the problem has a schedule.

    No less will do: after a micro-batch's last forward and before its first backward, a rank holds its activations of
    all its stages. No more is needed: run one micro-batch after the other with full backwards.
    """
    return tuple(
        initial + max(sum(p.activation_bytes[s] for s in _stages(p, rank)) for p in problem.pipelines)
        for rank, initial in enumerate(problem.initial_bytes)
    )


def check_feasible(problem: Problem) -> None:
    """Accept a problem that has a schedule.

    Raises:
        ValueError: a rank's limit is below what one micro-batch needs; the line names the smallest limit that would do.
    """
    if problem.memory_limit_bytes is None:
        return
    for rank, (limit, needed) in enumerate(zip(problem.memory_limit_bytes, smallest_limits(problem), strict=True)):
        if limit < needed:
            raise ValueError(f"rank {rank}: limit of {limit} bytes is too small for one micro-batch; it needs {needed}")


def gradient_ticks(pipeline: Pipeline, stage: int) -> int:
    """Ticks of a backward before its gradient can leave: x of the relaxation."""
    full = pipeline.backward_ticks[stage]
    return full if pipeline.input_grad_ticks is None else min(full, pipeline.input_grad_ticks[stage])


def backward_work_ticks(pipeline: Pipeline, stage: int) -> int:
    """Ticks a backward occupies its rank at least, split or not."""
    full = pipeline.backward_ticks[stage]
    if pipeline.input_grad_ticks is None or pipeline.weight_grad_ticks is None:
        return full
    return min(full, pipeline.input_grad_ticks[stage] + pipeline.weight_grad_ticks[stage])


def heads_and_tails(problem: Problem) -> tuple[list[Heads], list[Heads]]:
    """Earliest start of every operation, and least ticks from its end to the makespan, pipeline by pipeline."""
    scored_by: dict[int, list[int]] = {}
    for number, pipeline in enumerate(problem.pipelines):
        if pipeline.before is not None:
            scored_by.setdefault(pipeline.before, []).append(number)
    heads: dict[int, Heads] = {}
    tails: dict[int, Heads] = {}
    for number, pipeline in enumerate(problem.pipelines):
        if pipeline.is_forward_only:
            heads[number] = _with_forwards(_passes(pipeline.forward_ticks, _transfers(pipeline), _nothing(pipeline)))
    for number, pipeline in enumerate(problem.pipelines):
        if pipeline.is_forward_only:
            continue
        last_ticks, count = pipeline.forward_ticks[-1], pipeline.num_micro_batches
        floor = _nothing(pipeline)
        for other in scored_by.get(number, ()):
            first = heads[other].forward[-1, :count]
            np.maximum(floor, _behind(first, problem.pipelines[other].forward_ticks[-1], last_ticks), out=floor)
        forward = np.array(pipeline.forward_ticks, dtype=np.int64)
        backward = np.array([gradient_ticks(pipeline, stage) for stage in range(pipeline.num_stages)], dtype=np.int64)
        counts = [_num_in_flight(problem, pipeline, stage) for stage in range(pipeline.num_stages)]
        transfer = _transfers(pipeline)
        heads[number] = _earliest(forward, backward, transfer, counts, count, floor)
        mirrored = _earliest(backward, forward, transfer, counts, count, _nothing(pipeline))
        tails[number] = Heads(forward=mirrored.backward[:, ::-1], backward=mirrored.forward[:, ::-1])
    for number, pipeline in enumerate(problem.pipelines):
        if not pipeline.is_forward_only:
            continue
        floor = _nothing(pipeline)
        if pipeline.before is not None:
            user = problem.pipelines[pipeline.before]
            after = tails[pipeline.before].forward[-1, ::-1]
            behind = _behind(after, user.forward_ticks[-1], pipeline.forward_ticks[-1])
            floor[-user.num_micro_batches :] = behind
        mirrored_passes = _passes(pipeline.forward_ticks[::-1], _transfers(pipeline)[::-1], floor)
        tails[number] = _with_forwards(mirrored_passes[::-1, ::-1])
    numbers = range(len(problem.pipelines))
    return [heads[number] for number in numbers], [tails[number] for number in numbers]


def _transfers(pipeline: Pipeline) -> Ticks:
    """Between neighbouring stages."""
    return np.array([pipeline.transfer_ticks if a != b else 0 for a, b in pairwise(pipeline.ranks)], dtype=np.int64)


def _nothing(pipeline: Pipeline) -> Ticks:
    return np.zeros(pipeline.num_micro_batches, np.int64)


def _with_forwards(forward: Ticks) -> Heads:
    """Of a forward-only pipeline."""
    return Heads(forward, forward[:, :0])


def _passes(ticks: tuple[int, ...], transfer: Ticks, first: Ticks) -> Ticks:
    """Earliest starts [stages, micro-batches] of forwards alone. first: [micro-batches], at stage 0."""
    index = np.arange(len(first), dtype=np.int64)
    starts: list[Ticks] = []
    for stage, own in enumerate(ticks):
        start = starts[-1] + ticks[stage - 1] + transfer[stage - 1] if stage else first.copy()
        _at_least(start, own, index)
        starts.append(start)
    return np.stack(starts)


def _behind(first: Ticks, first_ticks: int, own_ticks: int) -> Ticks:
    """Earliest starts of operations on one rank, each behind its own of those that start at `first` at the earliest."""
    index = np.arange(len(first), dtype=np.int64)
    lead = np.maximum.accumulate(first - index * (first_ticks + own_ticks))
    earliest: Ticks = lead + index * (first_ticks + own_ticks) + first_ticks
    return earliest


def preemptive_makespan(jobs: list[tuple[int, int, int]]) -> int:
    """Shortest time in which one rank finishes jobs of (head, duration, tail) if it may interrupt them. O(n log n)."""
    released: list[tuple[int, int]] = []  # (-tail, remaining ticks)
    makespan = now = 0
    waiting = sorted(jobs, reverse=True)
    while waiting or released:
        if not released:
            now = max(now, waiting[-1][0])
        while waiting and waiting[-1][0] <= now:
            _, duration, tail = waiting.pop()
            heapq.heappush(released, (-tail, duration))
        negative_tail, remaining = heapq.heappop(released)
        until = min(now + remaining, waiting[-1][0]) if waiting else now + remaining
        if until < now + remaining:
            heapq.heappush(released, (negative_tail, now + remaining - until))
        else:
            makespan = max(makespan, until - negative_tail)
        now = until
    return makespan


def _stages(pipeline: Pipeline, rank: int) -> list[int]:
    return [stage for stage, home in enumerate(pipeline.ranks) if home == rank]


def _num_in_flight(problem: Problem, pipeline: Pipeline, stage: int) -> int:
    """Micro-batches of this stage that fit into its rank's memory, at most all."""
    rank, held = pipeline.ranks[stage], pipeline.activation_bytes[stage]
    if problem.memory_limit_bytes is None or held == 0:
        return pipeline.num_micro_batches
    room = problem.memory_limit_bytes[rank] - problem.initial_bytes[rank]
    return min(pipeline.num_micro_batches, room // held)


def _earliest(
    forward: Ticks, backward: Ticks, transfer: Ticks, counts: list[int], num_micro_batches: int, floor: Ticks
) -> Heads:
    """Least solution of the inequalities above, by sweeps over the stages until nothing moves.

    floor: [micro-batches], of the last stage's forwards.
    """
    num_stages = len(forward)
    index = np.arange(num_micro_batches, dtype=np.int64)
    heads = Heads(
        np.zeros((num_stages, num_micro_batches), np.int64), np.zeros((num_stages, num_micro_batches), np.int64)
    )
    while True:
        before = int(heads.forward.sum() + heads.backward.sum())
        for stage in range(num_stages):
            f, x, count = int(forward[stage]), int(backward[stage]), counts[stage]
            start = heads.forward[stage]
            if stage == num_stages - 1:
                np.maximum(start, floor, out=start)
            if stage:
                np.maximum(start, heads.forward[stage - 1] + forward[stage - 1] + transfer[stage - 1], out=start)
            if count < num_micro_batches:
                np.maximum(start[count:], heads.backward[stage, : num_micro_batches - count] + x, out=start[count:])
            _at_least(start, f, index)
            if count < num_micro_batches:
                lead = np.maximum.accumulate(start - index * (f + x))[: num_micro_batches - count]
                bound = lead + index[count:] * (f + x) - (count - 1) * x
                np.maximum(start[count:], bound, out=start[count:])
        for stage in reversed(range(num_stages)):
            f, x = int(forward[stage]), int(backward[stage])
            start = heads.backward[stage]
            if stage == num_stages - 1:
                np.maximum(start, heads.forward[stage] + f, out=start)
            else:
                np.maximum(start, heads.backward[stage + 1] + backward[stage + 1] + transfer[stage], out=start)
            lead = np.maximum.accumulate(heads.forward[stage] - index * (f + x))
            np.maximum(start, lead + index * (f + x) + f, out=start)
            _at_least(start, x, index)
        if int(heads.forward.sum() + heads.backward.sum()) == before:
            return heads


def _at_least(start: Ticks, gap: int, index: Ticks) -> None:
    """Raise `start[j]` to `start[j-1] + gap`, in place."""
    start[:] = np.maximum.accumulate(start - gap * index) + gap * index
