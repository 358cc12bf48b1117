"""Bytes as real models have them: constraint programs count in coarser units, and keep to limits all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ortools.sat.python import cp_model

from schedules import Pipeline, Problem, Schedule, check, evaluate
from schedules.baselines import one_f_one_b, serial
from schedules.bounds import smallest_limits
from schedules.fused import cpsat, pattern, windows
from schedules.fused.cp_solver import make_solver, run
from schedules.fused.cpsat import Outcome
from schedules.fused.memory_units import in_memory_units

GIB = 1 << 30


def problem(*, bytes_per_unit: int = 1, odd: int = 0, micro_batches: int = 4, limit: int | None = None) -> Problem:
    """Two models against each other on two ranks; activations of 3 and 2 units, and `odd` bytes."""
    pipelines = tuple(
        Pipeline(
            name=name,
            ranks=ranks,
            num_micro_batches=micro_batches,
            forward_ticks=(1000, 1000),
            backward_ticks=(2000, 2000),
            activation_bytes=(units * bytes_per_unit + odd,) * 2,
        )
        for name, ranks, units in (("actor", (0, 1), 3), ("critic", (1, 0), 2))
    )
    limits = None if limit is None else (limit,) * 2
    return Problem(num_ranks=2, pipelines=pipelines, memory_limit_bytes=limits)


def test_units_are_bytes_while_these_are_few_and_then_as_exact_as_can_be() -> None:
    small = problem()
    assert in_memory_units(small, 20) == in_memory_units(small, 10**9)
    assert in_memory_units(small, 20).problem is small
    large = in_memory_units(problem(bytes_per_unit=GIB, limit=7 * GIB + 5), 20)
    assert (large.problem, large.num_bytes, large.is_exact) == (problem(limit=7), GIB, True)
    with pytest.raises(ValueError, match="amounts of memory in 9 units: give ticks in a coarser unit"):
        in_memory_units(problem(bytes_per_unit=GIB, odd=1), 9)


def test_rounding_is_to_the_safe_side() -> None:
    odd = problem(bytes_per_unit=GIB, odd=7, limit=9 * GIB)
    units = in_memory_units(odd, 1000)
    assert not units.is_exact
    pairs = zip(odd.pipelines, units.problem.pipelines, strict=True)
    for stated, rounded in pairs:
        for num_bytes, num_units in zip(stated.activation_bytes, rounded.activation_bytes, strict=True):
            assert num_bytes <= num_units * units.num_bytes < num_bytes + units.num_bytes
    assert units.problem.memory_limit_bytes is not None
    assert max(units.problem.memory_limit_bytes) * units.num_bytes <= 9 * GIB
    for schedule in (serial(odd), serial(odd, one_f_one_b)):
        in_units = evaluate(Schedule(units.problem, schedule.ranks)).peak_bytes
        assert all(
            peak <= coarse * units.num_bytes
            for peak, coarse in zip(evaluate(schedule).peak_bytes, in_units, strict=True)
        )


def test_a_pattern_is_found_however_many_bytes() -> None:
    """Its objective adds up bytes times ticks of all ranks, which 64 bits did not hold."""
    small = problem(micro_batches=16)
    huge = (problem(bytes_per_unit=1 << 48, odd=odd, micro_batches=16) for odd in (0, 1))
    found = [pattern.find_pattern(one, time_limit_s=120, work_limit=0.2) for one in (small, *huge)]
    assert len({one and one.period_ticks for one in found}) == 1
    assert None not in found


@pytest.mark.parametrize("odd", [0, 1])
def test_programs_keep_to_limits_of_any_size(odd: int) -> None:
    unit = 1 << 52
    free = problem(bytes_per_unit=unit, odd=odd, micro_batches=2)
    limit = 8 * unit
    limited = replace(free, memory_limit_bytes=(limit, limit))
    start = serial(free, one_f_one_b)
    makespan = evaluate(start).makespan
    result = cpsat.shortest(limited, split=False, makespan=makespan, time_limit_s=120)
    assert result.schedule is not None
    check(Schedule(limited, result.schedule.ranks))
    if odd == 0:
        in_small = cpsat.shortest(problem(limit=8, micro_batches=2), split=False, makespan=makespan, time_limit_s=120)
        assert (result.outcome, result.value, result.bound) == (Outcome.OPTIMAL, in_small.value, in_small.bound)
    else:
        assert (result.outcome, result.bound) == (Outcome.FOUND, 0), "rounded memory proves nothing"

    below = max(evaluate(start).peak_bytes) + 1
    least = cpsat.lowest_peak(free, split=False, makespan=makespan, below_bytes=below, time_limit_s=120)
    assert least.schedule is not None
    assert least.value == max(evaluate(Schedule(free, least.schedule.ranks)).peak_bytes)
    assert least.bound <= least.value < below

    window = windows.Window(0, makespan)
    for better in (
        windows.shorten(
            Schedule(replace(free, memory_limit_bytes=(below, below)), start.ranks), window, time_limit_s=120
        ),
        windows.lower_peak(start, windows.Window(0, makespan // 2), time_limit_s=120),
    ):
        check(better)
        assert evaluate(better).makespan <= makespan
        assert max(evaluate(better).peak_bytes) < below


def test_nothing_that_fits_in_units_is_no_proof_that_nothing_fits() -> None:
    unit = 1 << 52
    tight = problem(bytes_per_unit=unit, odd=1)
    tight = replace(tight, memory_limit_bytes=smallest_limits(tight))
    result = cpsat.shortest(tight, split=False, makespan=24_000, time_limit_s=120)
    assert result.outcome in (Outcome.UNKNOWN, Outcome.FOUND)
    assert result.bound == 0


def test_an_invalid_program_is_an_error() -> None:
    program = cp_model.CpModel()
    program.minimize(sum((1 << 62) * program.new_int_var(0, 1 << 40, "") for _ in range(4)))
    with pytest.raises(
        ValueError, match=r"the constraint program is invalid .*: give ticks and bytes in coarser units"
    ):
        run(make_solver(time_limit_s=1, seed=0), program, lambda: False)
