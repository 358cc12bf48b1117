"""What micro-batches under way take on each rank, in the serial schedule and in a fused one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fuse.driver.model_size import ModelSize
from fuse.driver.stage_bytes import ModelBytes
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.placement import Counts, Replica
from fuse.intrastage.training_schedule import halved_serial_schedule, serial_schedule
from schedules import Pipeline, Problem, Schedule, evaluate
from schedules.fused.greedy import greedy

_TICKS = 1000
"""Of the largest stage's forward."""
_WHOLE = 4
"""Tensors of a layer that tensor-parallel ranks all hold: inputs and outputs of its two norms."""


def step_problem(
    placement: tuple[Replica, ...],
    models: Mapping[str, tuple[ModelSize, ModelBytes]],
    *,
    num_micro_batches: Counts,
    shape: Shape,
    splits: bool,
    tensor_parallel_size: int,
) -> Problem:
    """An optimizer step of micro-batches of this shape. models: by role.

    splits: backwards come in halves. Times are in proportion to parameters.

    Raises:
        ValueError: a replica would have no micro-batch.
    """
    bare = serial_schedule(placement, num_micro_batches).problem
    pipelines = (
        _pipeline(pipeline, replica, *models[replica.model], shape, splits, tensor_parallel_size)
        for pipeline, replica in zip(bare.pipelines, placement, strict=True)
    )
    return replace(bare, pipelines=tuple(pipelines))


def serial_peaks(problem: Problem, placement: tuple[Replica, ...], num_micro_batches: Counts) -> tuple[int, ...]:
    """Bytes by rank of one model after the other, with backwards in halves where they can, as the first update has it.

    problem: of `step_problem`, of this placement and number.
    """
    splits = all(pipeline.can_split for pipeline in problem.pipelines)
    order = halved_serial_schedule if splits else serial_schedule
    return evaluate(Schedule(problem, order(placement, num_micro_batches).ranks)).peak_bytes


def fused_peaks(problem: Problem, limits: Sequence[int]) -> tuple[int, ...]:
    """Bytes by rank of all models at once: as the solver's search starts, within these limits where that can be."""
    free = evaluate(greedy(problem)).peak_bytes
    if all(peak <= limit for peak, limit in zip(free, limits, strict=True)):
        return free
    try:
        limited = greedy(replace(problem, memory_limit_bytes=tuple(max(0, limit) for limit in limits)))
    except ValueError:  # not even one micro-batch fits
        return free
    return evaluate(limited).peak_bytes


def _pipeline(
    pipeline: Pipeline,
    replica: Replica,
    size: ModelSize,
    per_stage: ModelBytes,
    shape: Shape,
    splits: bool,
    tensor_parallel_size: int,
) -> Pipeline:
    last = pipeline.num_stages - 1
    ranges = replica.ranges(len(size.layers))
    held, deferred = [], []
    for stage, (start, stop) in enumerate(ranges):
        taken = per_stage.stage(shape, stop - start, is_first=stage == 0, is_last=stage == last)
        whole = min(taken.held, _WHOLE * (stop - start) * per_stage.boundary.at(shape.size))
        held.append(whole + (taken.held - whole) // tensor_parallel_size)
        deferred.append(taken.deferred // tensor_parallel_size)
    work = [sum(size.layers[start:stop]) for start, stop in ranges]
    work[-1] += size.head_shape[0] * size.head_shape[1]
    ticks = tuple(max(1, _TICKS * one // max(work)) for one in work)
    return replace(
        pipeline,
        forward_ticks=ticks,
        backward_ticks=tuple(2 * one for one in ticks),
        input_grad_ticks=ticks if splits else None,
        weight_grad_ticks=ticks if splits else None,
        activation_bytes=tuple(held),
        weight_grad_bytes=tuple(deferred) if splits else (),
    )
