"""Interleaved 1F1B: each rank has several stages, one lap of the ranks apart, which makes bubbles smaller."""

from __future__ import annotations

from schedules.baselines.single import only_pipeline
from schedules.ir import Kind, Op, Problem, Schedule


def interleaved(problem: Problem) -> Schedule:
    """1F1B over virtual stages: rank r of R runs stages r, r + R, r + 2R, ..., micro-batches in groups of R.

    With V stages per rank of equal forward f and backward b, M a multiple of R, the makespan is
    (M V + R - 1)(f + b): the bubble is 1/V of 1F1B's. Rank r holds at most
    min(M V, (V - 1) R + 2 (R - 1 - r) + 1) activations.

    Raises:
        ValueError: the problem has several pipelines, its stages do not go round the ranks, or its micro-batches do not
            fill groups of R.

    Source: Narayanan et al., Efficient large-scale language model training, SC 2021, section 2.2.2, and Megatron-LM's
    order of micro-batches within a rank.
    """
    pipeline = only_pipeline(problem, "interleaved")
    num_ranks = len(set(pipeline.ranks))
    num_laps, rest = divmod(pipeline.num_stages, num_ranks)
    if rest or any(rank != pipeline.ranks[stage % num_ranks] for stage, rank in enumerate(pipeline.ranks)):
        raise ValueError(f"interleaved: stages on ranks {pipeline.ranks} do not go round them in one order")
    if pipeline.num_micro_batches % num_ranks:
        raise ValueError(
            f"interleaved: {pipeline.num_micro_batches} micro-batches are not a multiple of {num_ranks} ranks; add some"
        )
    num_operations = pipeline.num_micro_batches * num_laps
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for position, rank in enumerate(pipeline.ranks[:num_ranks]):
        forwards, backwards = [], []
        for index in range(num_operations):
            group, within = divmod(index, num_ranks * num_laps)
            lap, offset = divmod(within, num_ranks)
            micro_batch = group * num_ranks + offset
            forwards.append(Op(0, lap * num_ranks + position, micro_batch, Kind.F))
            backwards.append(Op(0, (num_laps - 1 - lap) * num_ranks + position, micro_batch, Kind.B))
        num_warm_up = min(num_operations, (num_laps - 1) * num_ranks + 2 * (num_ranks - 1 - position))
        steady = [op for pair in zip(forwards[num_warm_up:], backwards, strict=False) for op in pair]
        orders[rank] = (*forwards[:num_warm_up], *steady, *backwards[num_operations - num_warm_up :])
    return Schedule(problem, tuple(orders))
