"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from schedules.baselines.single import one_stage_per_rank
from schedules.ir import Kind, Op, Problem, Schedule


def gpipe(problem: Problem) -> Schedule:
    """All micro-batches forward, then all backward in the same order.

    With P equal stages and M micro-batches the bubble ratio is (P - 1) / (M + P - 1); every rank holds M activations.

    Raises:
        ValueError: the problem has several pipelines or a rank with several stages.

    Source: Huang et al., GPipe, NeurIPS 2019, section 2.3. The backward order here is first in, first out, so that
    messages arrive in the order of their micro-batches.
    """
    pipeline = one_stage_per_rank(problem, "gpipe")
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for stage, rank in enumerate(pipeline.ranks):
        orders[rank] = tuple(
            Op(0, stage, micro_batch, kind)
            for kind in (Kind.F, Kind.B)
            for micro_batch in range(pipeline.num_micro_batches)
        )
    return Schedule(problem, tuple(orders))
