"""Zero-bubble schedules: split backwards, whose weight gradients fill what 1F1B leaves idle."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from schedules.baselines.single import one_stage_per_rank, only_pipeline
from schedules.ir import Kind, Op, Pipeline, Problem, Schedule
from schedules.walk import needs


def zero_bubble_h1(problem: Problem) -> Schedule:
    """ZB-H1: 1F1B with input gradients at once, and the weight gradients of stage s put off by s micro-batches.

    With P equal stages, M >= P micro-batches and weight_grad_ticks w <= forward_ticks f, the makespan is
    M (f + i + w) + (P - 1)(f + i - w): 1F1B's has f + i + w in the second term. No rank holds more than 1F1B's first
    stage.

    Raises:
        ValueError: the problem has several pipelines, a rank with several stages, or backwards that cannot be split.

    Source: Qi et al., Zero bubble pipeline parallelism, arXiv 2401.10241, section 2.2.
    """
    pipeline = _splittable(one_stage_per_rank(problem, "zero_bubble_h1"), "zero_bubble_h1")
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for stage, rank in enumerate(pipeline.ranks):
        forwards, input_grads, weight_grads = (
            iter([Op(0, stage, micro_batch, kind) for micro_batch in range(pipeline.num_micro_batches)])
            for kind in (Kind.F, Kind.I, Kind.W)
        )
        order = _take(forwards, pipeline.num_stages - stage)
        for micro_batch, input_grad in enumerate(input_grads):
            order += [input_grad, *_take(weight_grads, 1 if micro_batch >= stage else 0), *_take(forwards, 1)]
        orders[rank] = (*order, *weight_grads)
    return Schedule(problem, tuple(orders))


def zero_bubble_v(problem: Problem) -> Schedule:
    """ZB-V: two stages per rank in a V (0, 1, ..., P-1, P-1, ..., 1, 0), so that gradients soon reach every rank.

    An idle rank runs an input gradient, else a forward (of the second stage first), else a weight gradient. It holds at
    most 2 P micro-batches of its two stages, as 1F1B's first rank does. With equal stages, f = i = w = t and M >= P,
    the makespan is at least 6 M t + (P - 1) t, a rank's work and the way to the last rank, and at most (P - 2) t more.

    Raises:
        ValueError: the problem has several pipelines, another placement, or backwards that cannot be split.

    Source: Qi et al., Pipeline parallelism with controllable memory, arXiv 2405.15362, section 3. The order is found by
    simulation, not by the paper's fixed pattern.
    """
    pipeline = _splittable(only_pipeline(problem, "zero_bubble_v"), "zero_bubble_v")
    num_ranks = pipeline.num_stages // 2
    way = pipeline.ranks[:num_ranks]
    if not way or pipeline.ranks != way + way[::-1] or len(set(way)) != num_ranks:
        raise ValueError(f"zero_bubble_v: stages on ranks {pipeline.ranks} do not go along the ranks and back")
    orders: list[list[Op]] = [[] for _ in range(problem.num_ranks)]
    end: dict[Op, int] = {}
    free_at = [0] * problem.num_ranks
    events = [0]
    while events:
        now = heapq.heappop(events)
        for rank in way:
            if free_at[rank] > now:
                continue
            ready = [
                op
                for op in _candidates(pipeline, rank, orders[rank], 2 * num_ranks)
                if _arrival(problem, end, op) <= now
            ]
            if ready:
                op = min(ready, key=lambda op: ("IFW".index(op.kind), -op.stage))
                orders[rank].append(op)
                end[op] = free_at[rank] = now + problem.ticks(op)
                heapq.heappush(events, end[op])
                if pipeline.transfer_ticks:
                    heapq.heappush(events, end[op] + pipeline.transfer_ticks)
    return Schedule(problem, tuple(map(tuple, orders)))


def _splittable(pipeline: Pipeline, baseline: str) -> Pipeline:
    if not pipeline.can_split:
        raise ValueError(
            f"{baseline}: pipeline {pipeline.name} cannot split backwards; give input and weight grad ticks"
        )
    return pipeline


def _take(ops: Iterator[Op], count: int) -> list[Op]:
    return [op for _, op in zip(range(count), ops, strict=False)]


def _candidates(pipeline: Pipeline, rank: int, order: list[Op], max_held: int) -> Iterator[Op]:
    """The next operation of each chain of the rank; no forward beyond the number of micro-batches it may hold.

    The first stage leaves room for one micro-batch of the second, for only the second's gradients set memory free.
    """
    counts = {(op.stage, op.kind): op.micro_batch + 1 for op in order}
    held = sum(op.kind is Kind.F for op in order) - sum(op.kind is Kind.W for op in order)
    for stage, home in enumerate(pipeline.ranks):
        most = max_held - (stage < pipeline.num_stages // 2)
        for kind in (Kind.F, Kind.I, Kind.W):
            micro_batch = counts.get((stage, kind), 0)
            if home == rank and micro_batch < pipeline.num_micro_batches and (kind is not Kind.F or held < most):
                yield Op(0, stage, micro_batch, kind)


def _arrival(problem: Problem, end: dict[Op, int], op: Op) -> float:
    """When all that the operation needs has ended and been transferred; never, while some of it has not run."""
    gradient = op._replace(stage=op.stage + 1, kind=Kind.I)  # every backward is split
    sources = needs({gradient}, op, problem)
    return max((end.get(source, float("inf")) + problem.transfer_ticks(source, op) for source in sources), default=0)
