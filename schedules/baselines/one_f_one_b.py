"""1F1B: forwards to fill the pipeline, then one forward and one backward in turn, then the remaining backwards."""

from __future__ import annotations

from schedules.baselines.single import one_stage_per_rank
from schedules.ir import Kind, Op, Problem, Schedule


def one_f_one_b(problem: Problem) -> Schedule:
    """Non-interleaved 1F1B with flush.

    With P equal stages and M micro-batches the bubble ratio is (P - 1) / (M + P - 1), as GPipe's, and stage s holds at
    most min(M, P - s) activations.

    Raises:
        ValueError: the problem has several pipelines or a rank with several stages.

    Source: Narayanan et al., Efficient large-scale language model training, SC 2021, section 2.2.1 (PipeDream-Flush).
    """
    pipeline = one_stage_per_rank(problem, "one_f_one_b")
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for stage, rank in enumerate(pipeline.ranks):
        num_warm_up = min(pipeline.num_micro_batches, pipeline.num_stages - 1 - stage)
        forwards = [Op(0, stage, micro_batch, Kind.F) for micro_batch in range(pipeline.num_micro_batches)]
        backwards = [Op(0, stage, micro_batch, Kind.B) for micro_batch in range(pipeline.num_micro_batches)]
        steady = [op for pair in zip(forwards[num_warm_up:], backwards, strict=False) for op in pair]
        num_cool_down = min(pipeline.num_micro_batches, num_warm_up)
        orders[rank] = (*forwards[:num_warm_up], *steady, *backwards[pipeline.num_micro_batches - num_cool_down :])
    return Schedule(problem, tuple(orders))
