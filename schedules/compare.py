"""One problem under every known schedule, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from schedules.baselines import chimera, gpipe, interleaved, one_f_one_b, serial, zero_bubble_h1
from schedules.bounds import makespan_lower_bound
from schedules.fused.greedy import greedy
from schedules.ir import Pipeline, Problem, Schedule
from schedules.timing import Timing, evaluate
from schedules.validate import violations

_NUM_LAPS = 2


@dataclass(frozen=True, slots=True)
class Row:
    """A schedule of the problem and its times; or, without them, why there is none. `fits`: into the memory limits."""

    name: str
    schedule: Schedule | None
    timing: Timing | None
    fits: bool
    refusal: str = ""


def compare(problem: Problem, found: Mapping[str, Schedule] | None = None) -> tuple[Row, ...]:
    """A row for each baseline, one for the greedy rule, and one for each schedule in `found`, under its name.

    Baselines for one model run the models one after the other. The interleaved one cuts each stage in two, which is
    another problem with the same work on every rank. Baselines know of no memory limit.
    """
    known: dict[str, Callable[[], Schedule]] = {
        "serial GPipe": partial(serial, problem, gpipe),
        "serial 1F1B": partial(serial, problem, one_f_one_b),
        "serial interleaved": lambda: serial(in_laps(problem, _NUM_LAPS), interleaved),
        "serial zero-bubble": partial(serial, problem, zero_bubble_h1),
        "Chimera": partial(chimera, problem),
        "greedy": partial(greedy, problem),
    }
    known |= {name: partial(_given, schedule) for name, schedule in (found or {}).items()}
    return tuple(_row(name, make) for name, make in known.items())


def in_laps(problem: Problem, num_laps: int) -> Problem:
    """The same models in `num_laps` times as many stages, which go round the ranks that often.

    Raises:
        ValueError: ticks or bytes of a stage are no multiple of the laps.
    """
    return replace(problem, pipelines=tuple(_in_laps(pipeline, num_laps) for pipeline in problem.pipelines))


def table(problem: Problem, rows: Sequence[Row]) -> str:
    """The rows as text: makespan, how far it is above the bound, idle share, peak memory."""
    bound = makespan_lower_bound(problem)
    lines = [f"{'':20}{'makespan':>10}{'over bound':>12}{'idle':>8}{'peak memory':>13}"]
    for row in rows:
        if row.timing is None:
            lines.append(f"{row.name:20}  {row.refusal}")
            continue
        makespan, peak = row.timing.makespan, max(row.timing.peak_bytes)
        over, idle = f"{makespan / bound - 1:.1%}", f"{row.timing.bubble_ratio:.1%}"
        lines.append(
            f"{row.name:20}{makespan:>10,}{over:>12}{idle:>8}{peak:>13,}" + ("" if row.fits else "  over the limit")
        )
    return "\n".join([*lines, f"{'lower bound':20}{bound:>10,}"])


def _given(schedule: Schedule) -> Schedule:
    return schedule


def _row(name: str, make: Callable[[], Schedule]) -> Row:
    try:
        schedule = make()
    except ValueError as error:
        return Row(name, None, None, fits=False, refusal=str(error))
    return Row(name, schedule, evaluate(schedule), fits=not violations(schedule))


def _in_laps(pipeline: Pipeline, num_laps: int) -> Pipeline:
    def cut(field: str, values: tuple[int, ...]) -> tuple[int, ...]:
        for value in values:
            if value % num_laps:
                raise ValueError(f"pipeline {pipeline.name}: {field} {value} cannot be cut into {num_laps} equal parts")
        return tuple(value // num_laps for value in values) * num_laps

    split = pipeline.input_grad_ticks is not None and pipeline.weight_grad_ticks is not None
    return replace(
        pipeline,
        ranks=pipeline.ranks * num_laps,
        forward_ticks=cut("forward_ticks", pipeline.forward_ticks),
        backward_ticks=cut("backward_ticks", pipeline.backward_ticks),
        input_grad_ticks=cut("input_grad_ticks", pipeline.input_grad_ticks or ()) if split else None,
        weight_grad_ticks=cut("weight_grad_ticks", pipeline.weight_grad_ticks or ()) if split else None,
        activation_bytes=cut("activation_bytes", pipeline.activation_bytes),
        weight_grad_bytes=cut("weight_grad_bytes", pipeline.weight_grad_bytes),
    )
