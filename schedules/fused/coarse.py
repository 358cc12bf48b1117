"""A problem in coarser ticks, where native code could not count its own."""

from __future__ import annotations

from dataclasses import replace

from schedules.fused.compiled import MAX_TICKS
from schedules.ir import Pipeline, Problem


def coarsened(problem: Problem) -> tuple[Problem, int]:
    """The problem whose tick is so many of this one's, rounded and at least one each; itself and 1 where that fits.

    An order that is legal for one is for the other. A path of n operations and messages is longer or shorter by at most
    n / 2 of the coarse ticks, and by n where operations are shorter than half of one.
    """
    total = sum(map(_all_ticks, problem.pipelines))
    if total <= MAX_TICKS:
        return problem, 1
    factor = -(-total // (MAX_TICKS // 2))  # half of the most: what is rounded up has room
    return replace(problem, pipelines=tuple(_coarse(pipeline, factor) for pipeline in problem.pipelines)), factor


def _all_ticks(pipeline: Pipeline) -> int:
    """Of its operations, backwards whole or split, whichever takes longer, and a message for each."""
    total = 0
    halves = zip(pipeline.input_grad_ticks or (), pipeline.weight_grad_ticks or (), strict=True)
    whole = pipeline.backward_ticks or (0,) * len(pipeline.ranks)
    split = [sum(both) for both in halves] or whole
    for forward, backward, both in zip(pipeline.forward_ticks, whole, split, strict=True):
        total += forward + max(backward, both) + 3 * pipeline.transfer_ticks
    return total * pipeline.num_micro_batches


def _coarse(pipeline: Pipeline, factor: int) -> Pipeline:
    def ticks(own: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(max(1, _rounded(one, factor)) for one in own)

    return replace(
        pipeline,
        forward_ticks=ticks(pipeline.forward_ticks),
        backward_ticks=ticks(pipeline.backward_ticks),
        input_grad_ticks=None if pipeline.input_grad_ticks is None else ticks(pipeline.input_grad_ticks),
        weight_grad_ticks=None if pipeline.weight_grad_ticks is None else ticks(pipeline.weight_grad_ticks),
        transfer_ticks=_rounded(pipeline.transfer_ticks, factor),
    )


def _rounded(ticks: int, factor: int) -> int:
    return (2 * ticks + factor) // (2 * factor)
