"""One model after the other: what training without fusion does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from schedules.baselines.one_f_one_b import one_f_one_b
from schedules.ir import Kind, Op, Problem, Schedule


def serial(problem: Problem, baseline: Callable[[Problem], Schedule] = one_f_one_b) -> Schedule:
    """Each rank runs the first pipeline's operations, then the second's, and so on, each in `baseline`'s order.

    Forward-only pipelines come before all others.

    There is no barrier between two pipelines: a rank that is done with the first starts the second, so the makespan is
    at most the sum of the single makespans. Replicas on different ranks run side by side.

    Raises:
        ValueError: `baseline` refuses one of the pipelines.
    """
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for number, pipeline in sorted(enumerate(problem.pipelines), key=lambda one: not one[1].is_forward_only):
        one = replace(problem, pipelines=(replace(pipeline, before=None),))
        alone = _forwards(one) if pipeline.is_forward_only else baseline(one)
        for rank, order in enumerate(alone.ranks):
            orders[rank] += tuple(op._replace(pipeline=number) for op in order)
    return Schedule(problem, tuple(orders))


def _forwards(problem: Problem) -> Schedule:
    """A forward-only pipeline: every rank takes a micro-batch through its stages as soon as it comes, in their order.

    Where a rank has several stages, it takes those of one lap for as many micro-batches as there are ranks in turn.
    """
    (pipeline,) = problem.pipelines
    num_ranks = len(set(pipeline.ranks))
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for rank in set(pipeline.ranks):
        held = [stage for stage, home in enumerate(pipeline.ranks) if home == rank]
        keyed = [
            (micro_batch // num_ranks, stage, micro_batch)
            for stage in held
            for micro_batch in range(pipeline.num_micro_batches)
        ]
        orders[rank] = tuple(Op(0, stage, micro_batch, Kind.F) for _, stage, micro_batch in sorted(keyed))
    return Schedule(problem, tuple(orders))
