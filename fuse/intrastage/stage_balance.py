"""Balances stages by measured time: the layers of each stage, embedding and head included, and the models' directions.

Three short stages of each model are measured: embedding and one layer, one layer, one layer and head. A model's layers
cost the same, so these three give the costs of every stage that it may be divided into. A division is judged by the
schedule that it allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

from fuse.intrastage.cost_profile import Profile, StageCosts
from fuse.intrastage.measurement_store import Measured
from fuse.intrastage.opposite import has_opposites, without_opposites
from fuse.intrastage.placement import Counts, Replica, one_of_alike
from fuse.intrastage.search_time import SearchTime
from fuse.intrastage.training_schedule import fused_problem, serial_schedule, solved, unfused
from schedules import Problem, evaluate
from schedules.fused.greedy import greedy
from schedules.fused.parts import busiest_ticks

_SOLVE_S, _LEAST_SOLVE_S = 1.0, 0.05
"""For each direction; most problems of a run are solved sooner, or compared well enough by then."""
_DESCENT_SHARE = 0.7
"""Of the time, for where layers move; the rest is for solving what that leads to."""
_MOST_SOLVED = 4_000
"""Micro-batches times stages, up to which placements are compared by solving."""

_COSTS = tuple(
    field.name for field in fields(StageCosts) if field.name.endswith("_ticks") or field.name.endswith("_bytes")
)


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What one layer of a model costs: the first with the embedding, one between, and the last with the head."""

    first: StageCosts
    layer: StageCosts
    last: StageCosts

    @classmethod
    def of(cls, profiles: Sequence[Profile], role: str) -> LayerCosts:
        """Medians over the ranks, which have all measured stages 0, 1 and 2 of a pipeline named as the model's role."""
        measured = [[one for one in profile.stages if one.pipeline == role] for profile in profiles]
        first, layer, last = (_median(stages) for stages in zip(*measured, strict=True))
        return cls(first, layer, last)

    def stage(self, pipeline: str, stage: int, num_stages: int, num_layers: int) -> StageCosts:
        """What a stage of so many layers costs."""

        def total(name: str) -> int | None:
            layer: int | None = getattr(self.layer, name)
            if layer is None:
                return None
            embedding: int = max(0, getattr(self.first, name) - layer) if stage == 0 else 0
            head: int = max(0, getattr(self.last, name) - layer) if stage == num_stages - 1 else 0
            return max(int(name.endswith("_ticks")), num_layers * layer + embedding + head)

        costs = {name: total(name) for name in _COSTS}
        return replace(self.layer, pipeline=pipeline, stage=stage, **costs)  # type: ignore[arg-type]


def balance_stages(
    costs: Mapping[str, LayerCosts],
    placement: Sequence[Replica],
    num_layers: Mapping[str, int],
    counts: Counts,
    *,
    is_fused: bool,
    tick_s: float,
    within: SearchTime,
) -> tuple[Replica, ...]:
    """`placement` with those layers of every stage, and those directions of the models, that train soonest.

    Stages start with equal numbers of layers; then layers move one by one to the stage next to theirs while that
    shortens the schedule. With fusion this is the greedy one, and it is done for every choice of directions: the first
    model of the placement keeps its own, each other one runs as placed, or the other way. What all choices lead to is
    then solved and compared, and with opposite replicas equal numbers of layers, too. Transfers are left out: they are
    as many wherever the stages begin. Of groups of replicas that are alike one is searched for all.

    costs: by role, measured with ticks of `tick_s`, on micro-batches of one shape. num_layers: by role.
    within: the search ends with the best it has found by then; no schedule of a placement is begun later.
    """
    shape = costs[placement[0].model].layer.shape
    group, own_counts = one_of_alike(_even(placement, num_layers), counts)

    def problem(candidate: tuple[Replica, ...]) -> Problem:
        return fused_problem(_predicted(costs, candidate, tick_s), candidate, own_counts, shape)

    def serial(candidate: tuple[Replica, ...]) -> int:
        uncut = tuple(replace(replica, layer_ranges=None) for replica in candidate)
        return evaluate(replace(serial_schedule(uncut, own_counts), problem=problem(candidate))).makespan

    def busiest(candidate: tuple[Replica, ...]) -> int:
        return busiest_ticks(problem(candidate))

    if not is_fused:
        return _as_found(placement, group, _descend(group, serial, busiest, within)[0])

    def fused(candidate: tuple[Replica, ...]) -> int:
        return evaluate(greedy(problem(candidate))).makespan

    starts = list(_directions(group))
    found = [
        _descend(start, fused, busiest, within.part(_DESCENT_SHARE / (len(starts) - number)))
        for number, start in enumerate(starts)
    ]
    candidates = [one for one, _ in found]
    if has_opposites(group):  # a rank's two stages make up for one another, which the greedy schedule need not show
        candidates.append(group)
    if within.is_over or num_forwards(problem(group)) > _MOST_SOLVED:
        known = [(makespan, one) for one, makespan in found if makespan is not None]
        best = min(known, key=lambda pair: pair[0])[1] if known else group
    else:
        best = min(candidates, key=lambda one: _solved_makespan(problem(one), within.left_s / len(candidates)))
    return _as_found(placement, group, best)


def unfused_stages(
    costs: Mapping[str, LayerCosts],
    placement: Sequence[Replica],
    num_layers: Mapping[str, int],
    counts: Counts,
    *,
    tick_s: float,
    within: SearchTime,
) -> Measured:
    """The stages that suit training one model after the other best, and what they would cost; as `balance_stages`.

    Without opposite replicas.
    """
    plain = without_opposites(placement)
    balanced = balance_stages(costs, plain, num_layers, counts, is_fused=False, tick_s=tick_s, within=within)
    return Measured(balanced, _predicted(costs, balanced, tick_s))


def predicted_step_s(
    costs: Mapping[str, LayerCosts],
    placement: tuple[Replica, ...],
    counts: Counts,
    *,
    is_fused: bool,
    tick_s: float,
) -> float:
    """Seconds of a step's operations in balanced stages, messages left out: all replicas at once, or model by model."""
    shape = costs[placement[0].model].layer.shape
    group, own_counts = one_of_alike(placement, counts)
    problem = fused_problem(_predicted(costs, group, tick_s), group, own_counts, shape)
    if not is_fused:
        return tick_s * evaluate(unfused(problem)).makespan
    if num_forwards(problem) > _MOST_SOLVED:
        return tick_s * evaluate(greedy(problem)).makespan
    return tick_s * _solved_makespan(problem, _SOLVE_S)


def _solved_makespan(problem: Problem, time_limit_s: float) -> int:
    return solved(problem, max(_LEAST_SOLVE_S, min(_SOLVE_S, time_limit_s)), num_workers=1).makespan


def num_forwards(problem: Problem) -> int:
    """Micro-batches times stages, over all pipelines."""
    return sum(one.num_micro_batches * one.num_stages for one in problem.pipelines)


def _descend(
    placement: tuple[Replica, ...],
    makespan: Callable[[tuple[Replica, ...]], int],
    busiest: Callable[[tuple[Replica, ...]], int],
    within: SearchTime,
) -> tuple[tuple[Replica, ...], int | None]:
    """Where moving one layer at a time leads, and its makespan, None where there was no time for one.

    Of a placement's neighbours those are tried first whose busiest rank has least to do; when time is over, the best
    that was tried is the last.
    """
    if within.is_over:
        return placement, None
    shortest = makespan(placement)
    while True:
        best = placement
        for one in sorted(_neighbours(placement), key=busiest):
            if within.is_over:
                return best, shortest
            if (found := makespan(one)) < shortest:
                shortest, best = found, one
        if best is placement:
            return placement, shortest
        placement = best


def _as_found(placement: Sequence[Replica], group: Sequence[Replica], found: Sequence[Replica]) -> tuple[Replica, ...]:
    """All replicas of a placement with the layers and directions found for one group of them, as it was."""
    cut = {
        after.model: (after.layer_ranges, before.ranks != after.ranks)
        for before, after in zip(group, found, strict=True)
    }
    return tuple(
        replace(one, layer_ranges=cut[one.model][0], ranks=one.ranks[::-1] if cut[one.model][1] else one.ranks)
        for one in placement
    )


def _neighbours(placement: tuple[Replica, ...]) -> Iterator[tuple[Replica, ...]]:
    """All placements with one layer of one model on the other side of a boundary between stages."""
    for model, ranges in {replica.model: replica.layer_ranges for replica in placement}.items():
        assert ranges is not None
        for right, step in itertools.product(range(1, len(ranges)), (-1, 1)):
            (start, boundary), (_, stop) = ranges[right - 1 : right + 1]
            moved = boundary + step
            if min(moved - start, stop - moved) >= 1:
                found = (*ranges[: right - 1], (start, moved), (moved, stop), *ranges[right + 1 :])
                yield tuple(replace(one, layer_ranges=found) if one.model == model else one for one in placement)


def _even(placement: Sequence[Replica], num_layers: Mapping[str, int]) -> tuple[Replica, ...]:
    bare = (replace(replica, layer_ranges=None) for replica in placement)
    return tuple(replace(one, layer_ranges=one.ranges(num_layers[one.model])) for one in bare)


def _directions(placement: tuple[Replica, ...]) -> Iterator[tuple[Replica, ...]]:
    """Every model but the first as placed, or the other way; all as placed come first."""
    _, *others = dict.fromkeys(replica.model for replica in placement)
    for choice in itertools.product((False, True), repeat=len(others)):
        turned = {model for model, is_turned in zip(others, choice, strict=True) if is_turned}
        yield tuple(
            replace(replica, ranks=replica.ranks[::-1]) if replica.model in turned else replica for replica in placement
        )


def _predicted(costs: Mapping[str, LayerCosts], placement: Sequence[Replica], tick_s: float) -> Profile:
    stages = []
    for replica in placement:
        assert replica.layer_ranges is not None
        count = len(replica.ranks)
        stages += [
            costs[replica.model].stage(replica.name, stage, count, stop - start)
            for stage, (start, stop) in enumerate(replica.layer_ranges)
        ]
    return Profile(tick_s=tick_s, stages=tuple(stages), transfers=())


def _median(measured: Sequence[StageCosts]) -> StageCosts:
    def middle(name: str) -> int | None:
        values = [getattr(one, name) for one in measured]
        return None if values[0] is None else round(median(values))

    return replace(measured[0], **{name: middle(name) for name in _COSTS})  # type: ignore[arg-type]
