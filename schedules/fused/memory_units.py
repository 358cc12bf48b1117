"""Memory in units so coarse that a constraint program's sums of bytes times ticks stay within 64 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from schedules.ir import Pipeline, Problem

MOST_BYTE_TICKS = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryUnits:
    """A problem with its memory in units of `num_bytes`.

    is_exact: every amount is whole units. If not, what is held is rounded up and limits are rounded down: a schedule
    within the limits in units is within them in bytes, but what cannot be done in units may be possible in bytes.
    """

    problem: Problem
    num_bytes: int
    is_exact: bool


def in_memory_units(problem: Problem, most_units: int) -> MemoryUnits:
    """The problem in the smallest unit, if one may choose, in which no rank could ever hold more than `most_units`.

    Bytes stay bytes where they can; else the unit is their greatest common divisor, and where that is not enough,
    amounts are rounded.

    Raises:
        ValueError: there are more amounts than units.
    """
    held: list[list[int]] = [[initial] for initial in problem.initial_bytes]
    for pipeline in problem.pipelines:
        for stage, rank in enumerate(pipeline.ranks):
            each = (pipeline.activation_bytes[stage], pipeline.weight_grad_bytes[stage])
            held[rank] += [num_bytes for num_bytes in each for _ in range(pipeline.num_micro_batches)]
    most_bytes = max(map(sum, held))
    if most_bytes <= most_units:
        return MemoryUnits(problem, 1, is_exact=True)
    common = math.gcd(*(num_bytes for of_rank in held for num_bytes in of_rank))
    if most_bytes <= common * most_units:
        return MemoryUnits(_in_units(problem, common), common, is_exact=True)
    most_amounts = max(map(len, held))  # each of which may be rounded up by less than a unit
    if most_units <= most_amounts:
        raise ValueError(f"{most_amounts} amounts of memory in {most_units} units: give ticks in a coarser unit")
    unit = _ceil(most_bytes, most_units - most_amounts)
    return MemoryUnits(_in_units(problem, unit), unit, is_exact=False)


def _in_units(problem: Problem, unit: int) -> Problem:
    initial = tuple(_ceil(num_bytes, unit) for num_bytes in problem.initial_bytes)
    limits = problem.memory_limit_bytes
    return replace(
        problem,
        pipelines=tuple(_pipeline_in_units(pipeline, unit) for pipeline in problem.pipelines),
        initial_bytes=initial,
        # Where rounding leaves less than what is there from the start, there is room for nothing.
        memory_limit_bytes=limits
        and tuple(max(limit // unit, least) for limit, least in zip(limits, initial, strict=True)),
    )


def _pipeline_in_units(pipeline: Pipeline, unit: int) -> Pipeline:
    return replace(
        pipeline,
        activation_bytes=tuple(_ceil(num_bytes, unit) for num_bytes in pipeline.activation_bytes),
        weight_grad_bytes=tuple(_ceil(num_bytes, unit) for num_bytes in pipeline.weight_grad_bytes),
    )


def _ceil(num_bytes: int, unit: int) -> int:
    return -(-num_bytes // unit)
