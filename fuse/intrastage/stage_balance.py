"""Where to cut models into stages, and which way the critic runs: by measured time, with embedding and head included.

Three short stages of a model are measured: embedding and one layer, one layer, one layer and head. Their differences
give the costs of every stage that could be cut, on the ground that a model's layers cost the same. A cut is judged by
the schedule that it allows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median

from fuse.intrastage.placement import ModelName, Replica
from fuse.intrastage.plan import fused_problem, serial_schedule
from fuse.intrastage.profile import Profile, StageCosts
from schedules import Problem, evaluate
from schedules.fused.greedy import greedy

LayerRanges = tuple[tuple[int, int], ...]

_SOLVE_S = 1.0
"""For each direction; most problems of a run are solved sooner, or compared well enough by then."""

_COSTS = tuple(
    field.name for field in fields(StageCosts) if field.name.endswith("_ticks") or field.name.endswith("_bytes")
)


@dataclass(frozen=True, slots=True)
class Parts:
    """A model's measured stages of one layer each: the first has the embedding, too, the last the head."""

    first: StageCosts
    layer: StageCosts
    last: StageCosts

    @classmethod
    def of(cls, profiles: Sequence[Profile], model: ModelName) -> Parts:
        """Medians over the ranks, which have all measured stages 0, 1 and 2 of a pipeline named as the model."""
        measured = [[one for one in profile.stages if one.pipeline == model] for profile in profiles]
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


def choose_placement(
    parts: Mapping[ModelName, Parts],
    placement: Sequence[Replica],
    num_layers: Mapping[ModelName, int],
    num_micro_batches: int,
    *,
    is_fused: bool,
    tick_s: float,
) -> tuple[Replica, ...]:
    """`placement` with the layers of every stage, and the direction of the critic, that train soonest.

    For either direction of the critic, starts from even cuts and moves a layer over the boundary next to it while that
    shortens the greedy schedule; then solves what both came to. Transfers are left out: all cuts have as many.

    parts: measured with ticks of `tick_s`, on micro-batches of one shape.
    """

    def problem(candidate: tuple[Replica, ...]) -> Problem:
        shape = parts["actor"].layer.shape
        return fused_problem(_predicted(parts, candidate, tick_s), candidate, num_micro_batches, shape)

    def unfused(candidate: tuple[Replica, ...]) -> int:
        return evaluate(replace(serial_schedule(candidate, num_micro_batches), problem=problem(candidate))).makespan

    even = _even(tuple(placement), num_layers)
    if not is_fused:
        return _descend(even, unfused)
    from schedules.fused.solve import Objective, solve  # imports OR-tools, which workers do without

    descended = [_descend(start, lambda one: evaluate(greedy(problem(one))).makespan) for start in _directions(even)]

    def fused(candidate: tuple[Replica, ...]) -> int:
        return solve(problem(candidate), time_limit_s=_SOLVE_S, num_workers=1, objective=Objective.MAKESPAN).makespan

    return min(descended, key=fused)


def _descend(placement: tuple[Replica, ...], makespan: Callable[[tuple[Replica, ...]], int]) -> tuple[Replica, ...]:
    shortest = makespan(placement)
    while True:
        found = min(((makespan(one), one) for one in _neighbours(placement)), key=lambda pair: pair[0], default=None)
        if found is None or found[0] >= shortest:
            return placement
        shortest, placement = found


def _neighbours(placement: tuple[Replica, ...]) -> Iterator[tuple[Replica, ...]]:
    """All placements with one layer of one model on the other side of a boundary between stages."""
    for model, ranges in {replica.model: replica.layer_ranges for replica in placement}.items():
        assert ranges is not None
        for boundary, step in itertools.product(range(1, len(ranges)), (-1, 1)):
            (start, cut), (_, stop) = ranges[boundary - 1 : boundary + 1]
            moved = cut + step
            if min(moved - start, stop - moved) >= 1:
                cuts = (*ranges[: boundary - 1], (start, moved), (moved, stop), *ranges[boundary + 1 :])
                yield tuple(replace(one, layer_ranges=cuts) if one.model == model else one for one in placement)


def _even(placement: tuple[Replica, ...], num_layers: Mapping[ModelName, int]) -> tuple[Replica, ...]:
    def ranges(replica: Replica) -> LayerRanges:
        count, layers = len(replica.ranks), num_layers[replica.model]
        return tuple((layers * stage // count, layers * (stage + 1) // count) for stage in range(count))

    return tuple(replace(replica, layer_ranges=ranges(replica)) for replica in placement)


def _directions(placement: tuple[Replica, ...]) -> Iterator[tuple[Replica, ...]]:
    """Critic as placed, which is against the actor, then the other way."""
    yield placement
    yield tuple(
        replace(replica, ranks=replica.ranks[::-1]) if replica.model == "critic" else replica for replica in placement
    )


def _predicted(parts: Mapping[ModelName, Parts], placement: Sequence[Replica], tick_s: float) -> Profile:
    stages = []
    for replica in placement:
        assert replica.layer_ranges is not None
        count = len(replica.ranks)
        stages += [
            parts[replica.model].stage(replica.name, stage, count, stop - start)
            for stage, (start, stop) in enumerate(replica.layer_ranges)
        ]
    return Profile(tick_s=tick_s, stages=tuple(stages), transfers=())


def _median(measured: Sequence[StageCosts]) -> StageCosts:
    def middle(name: str) -> int | None:
        values = [getattr(one, name) for one in measured]
        return None if values[0] is None else round(median(values))

    return replace(measured[0], **{name: middle(name) for name in _COSTS})  # type: ignore[arg-type]
