"""Native reservation starts and annealing, in slices of time, interruptible, within memory caps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from schedules import _native
from schedules.fused.compiled import Compiled
from schedules.fused.incumbent import Deadline
from schedules.ir import Pipeline, Problem, Schedule

# What a rank without a limit may hold: more than any problem needs, and far from overflow.
UNLIMITED_BYTES = 2**60

# Initial and final temperature (in mean forward durations), weight of memory above the caps. Runs take turns: even
# problems want the first, tight memory a higher weight, uneven stages with tight memory the hot starts at odd places.
_REGIMES = ((0.4, 0.1, 3.0), (2.0, 0.1, 6.0), (0.4, 0.1, 6.0), (2.0, 0.1, 6.0))

_CHUNK_S = 0.02
_LARGE_GRAPH = 1000  # operations; larger ones are annealed in windows of at least so many, or of a share of all
_WINDOW = 500
_WINDOW_SHARE = 8

Caps = NDArray[np.int64]


@dataclass(slots=True)
class Speed:
    """Annealing steps per second on this graph, a guess until measured; keeps a run within the time that is left."""

    steps_per_s: float

    @staticmethod
    def guess(num_operations: int) -> Speed:
        return Speed(min(2e6, 4e9 / num_operations))


def memory_caps(problem: Problem, cap_bytes: int = UNLIMITED_BYTES) -> Caps:
    """Per rank, the lower of the problem's limit and a common cap."""
    limits = problem.memory_limit_bytes or (UNLIMITED_BYTES,) * problem.num_ranks
    return np.minimum(np.array(limits, dtype=np.int64), cap_bytes)


def pipeline_groups(problem: Problem) -> list[int]:
    """The group of each pipeline: replicas of one model form one, and the group with most work per rank is number 0."""
    groups: list[list[int]] = []
    for number, pipeline in enumerate(problem.pipelines):
        for group in groups:
            first = problem.pipelines[group[0]]
            taken = {rank for member in group for rank in problem.pipelines[member].ranks}
            if _shape(pipeline) == _shape(first) and not taken & set(pipeline.ranks):
                group.append(number)
                break
        else:
            groups.append([number])
    groups.sort(key=lambda group: -_ticks(problem.pipelines[group[0]]))
    return [next(g for g, group in enumerate(groups) if number in group) for number in range(len(problem.pipelines))]


def reservation_start(
    compiled: Compiled, caps: Caps, target: int, seed: int, slice_s: float, deadline: Deadline
) -> Schedule | None:
    """The shortest reservation schedule found in a slice of time; None when none fits into the caps."""
    search = _native.ReservationSearch(compiled.graph, pipeline_groups(compiled.problem), caps, target, seed)
    until = monotonic() + min(slice_s, deadline.left_s)
    while monotonic() < until and not deadline.is_over and not search.advance(8):
        pass
    return compiled.schedule(search.best()) if search.found else None


def anneal(
    compiled: Compiled,
    start: Schedule,
    caps: Caps,
    target: int,
    *,
    seed: int,
    num_steps: int,
    regime: int,
    speed: Speed,
    deadline: Deadline,
    is_stale: Callable[[], bool] = lambda: False,
    tighten: Callable[[Schedule], Caps | None] = lambda _: None,
) -> Schedule | None:
    """The last schedule that met the target within the caps, else the shortest within them; None when none was found.

    Cooling is laid out for `num_steps`, or for what fits into the time left; `regime` counts through ways to cool.
    `is_stale` is asked now and then whether the run has become pointless. A schedule that meets the target is given to
    `tighten`, which returns lower caps, under which the run goes on from there, or None, which ends it.
    """
    num_steps = max(1000, min(num_steps, int(deadline.left_s * speed.steps_per_s)))
    options = _native.AnnealingOptions()
    options.initial_temperature, options.final_temperature, options.excess_weight = _REGIMES[regime % len(_REGIMES)]
    num_operations = len(compiled.ops)
    options.window = max(_WINDOW, num_operations // _WINDOW_SHARE) if num_operations > _LARGE_GRAPH else 0
    annealing = _native.Annealing(compiled.graph, *compiled.orders(start), caps, target, num_steps, seed, options)
    begin_s = monotonic()
    chunk = max(128, int(_CHUNK_S * speed.steps_per_s))
    best: Schedule | None = None
    while not deadline.is_over and not is_stale():
        if annealing.advance(chunk):
            if not annealing.found or annealing.best_makespan > target:
                break
            best = compiled.schedule(annealing.best())
            tighter = tighten(best)
            if tighter is None:
                break
            annealing.change_caps(tighter)
    elapsed_s = monotonic() - begin_s
    if annealing.num_steps_done > 10 * chunk:
        speed.steps_per_s = annealing.num_steps_done / elapsed_s
    return best or (compiled.schedule(annealing.best()) if annealing.found else None)


def _shape(pipeline: Pipeline) -> Pipeline:
    return replace(pipeline, name="-", ranks=(0,) * pipeline.num_stages, before=None)


def _ticks(pipeline: Pipeline) -> int:
    return pipeline.num_micro_batches * (sum(pipeline.forward_ticks) + sum(pipeline.backward_ticks))
