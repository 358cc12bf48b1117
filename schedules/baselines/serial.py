"""One model after the other: what training without fusion does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from schedules.baselines.one_f_one_b import one_f_one_b
from schedules.ir import Op, Problem, Schedule


def serial(problem: Problem, baseline: Callable[[Problem], Schedule] = one_f_one_b) -> Schedule:
    """Each rank runs the first pipeline's operations, then the second's, and so on, each in `baseline`'s order.

    There is no barrier between two pipelines: a rank that is done with the first starts the second, so the makespan is
    at most the sum of the single makespans. Replicas on different ranks run side by side.

    Raises:
        ValueError: `baseline` refuses one of the pipelines.
    """
    orders: list[tuple[Op, ...]] = [()] * problem.num_ranks
    for number, pipeline in enumerate(problem.pipelines):
        alone = baseline(replace(problem, pipelines=(pipeline,)))
        for rank, order in enumerate(alone.ranks):
            orders[rank] += tuple(replace(op, pipeline=number) for op in order)
    return Schedule(problem, tuple(orders))
