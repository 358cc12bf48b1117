"""When each operation of a schedule should run, given a profile and the micro-batches at hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.observed import TRAIN
from fuse.trace import Span
from schedules import Kind, Op, Problem, Schedule, Timing, evaluate

_TICK_S = 1e-6
_APART = 1.25
"""How many times as large a shape is that tells a slope."""


@dataclass(frozen=True, slots=True)
class PlannedTimes:
    """The plan of one step, in seconds from its first operation.

    start_s, end_s: of the shape of `schedule.ranks`. transfer_s: by pipeline, what a message takes. bubble_ratio: idle
    share of all ranks.
    """

    start_s: tuple[tuple[float, ...], ...]
    end_s: tuple[tuple[float, ...], ...]
    transfer_s: tuple[float, ...]
    bubble_ratio: float

    @property
    def makespan_s(self) -> float:
        return max(map(max, filter(None, self.end_s)), default=0.0)

    def of_rank(self, rank: int) -> list[tuple[float, float]]:
        """Start and end of its operations, in order."""
        return list(zip(self.start_s[rank], self.end_s[rank], strict=True))


def planned_times(
    schedule: Schedule,
    profile: Profile,
    names: Sequence[str],
    shapes: Sequence[Sequence[Shape]],
    *,
    gap_s: float = 0.0,
) -> PlannedTimes:
    """Time a schedule's order with what each of its micro-batches should cost.

    The problem's own ticks are not used, so that the order may come from another shape, or from no profile.

    names: by pipeline, what the profile calls it. shapes: by pipeline and micro-batch. gap_s: that each operation takes
        beyond what was measured.

    Raises:
        ValueError: the profile lacks a stage, or a backward is split that was measured whole.
    """
    seconds: dict[Op, float] = {}
    lines: dict[tuple[int, int, Kind], CostLine] = {}
    for _, op in schedule.ops():
        key = op.pipeline, op.stage, op.kind
        if key not in lines:
            lines[key] = CostLine.of(profile, names[op.pipeline], op.stage, op.kind)
        seconds[op] = gap_s + lines[key].seconds(shapes[op.pipeline][op.micro_batch])
    transfer_s = tuple(
        profile.tick_s * profile.transfer_ticks(name, max(of_pipeline, key=lambda shape: shape.size))
        for name, of_pipeline in zip(names, shapes, strict=True)
    )
    return times_of(schedule, seconds, transfer_s)


def with_planned(spans: Sequence[Span], planned: Iterable[tuple[float, float] | None]) -> list[Span]:
    """A rank's spans, those of its operations with when they were to run: `planned_start_s`, `planned_end_s`.

    Both count from the first operation of the step.

    planned: of each operation, in turn; None of a step of which there is no plan.
    """
    left = iter(planned)
    told = [_beside(span, next(left)) if span.category == TRAIN else span for span in spans]
    assert not list(left), "some operations have left no span"
    return told


def _beside(span: Span, planned: tuple[float, float] | None) -> Span:
    if planned is None:
        return span
    start_s, end_s = planned
    arguments = {**span.arguments, "planned_start_s": start_s, "planned_end_s": end_s}
    return Span(span.name, span.category, span.start_s, span.end_s, arguments)


def times_of(schedule: Schedule, seconds: Mapping[Op, float], transfer_s: tuple[float, ...]) -> PlannedTimes:
    """The plan of a schedule's order from the seconds of each operation and, by pipeline, of a message."""
    timing = evaluate_seconds(schedule, seconds, transfer_s)
    start_s, end_s = (
        tuple(tuple(_TICK_S * time for time in of_rank) for of_rank in times) for times in (timing.start, timing.end)
    )
    return PlannedTimes(start_s, end_s, transfer_s, timing.bubble_ratio)


@dataclass(frozen=True, slots=True)
class CostLine:
    """What one kind of operation of a stage takes by the shape of its micro-batch, in seconds.

    At shapes that were measured it is what was; else linear in tokens between and beyond them. Shapes of about one
    size, as micro-batches dealt by length have, are one point of the line, for the slope between them would be noise.
    One point alone is scaled in proportion to tokens.

    measured: ticks by shape. points: of the line, (tokens, ticks), ascending.
    """

    tick_s: float
    measured: Mapping[Shape, int]
    points: Sequence[tuple[float, float]]

    @classmethod
    def of(cls, profile: Profile, name: str, stage: int, kind: Kind) -> CostLine:
        """Raises: ValueError where the profile lacks the stage, or a backward is split that was measured whole."""
        costs = [one for one in profile.stages if (one.pipeline, one.stage) == (name, stage)]
        if not costs:
            raise ValueError(f"profile has no stage {stage} of pipeline {name}: measure it on this placement")
        measured = {one.shape: ticks for one in costs if (ticks := _ticks(one, kind)) is not None}
        if len(measured) < len(costs):
            raise ValueError(f"profile has no {kind} of stage {stage} of {name}: build stages with split_backward=True")
        by_size: dict[int, list[int]] = {}
        for shape, ticks in measured.items():
            by_size.setdefault(shape.size, []).append(ticks)
        points = [(size, sum(ticks) / len(ticks)) for size, ticks in sorted(by_size.items())]
        return cls(profile.tick_s, measured, _apart(points))

    def seconds(self, shape: Shape) -> float:
        """Of the operation on a micro-batch of this shape."""
        ticks = self.measured.get(shape)
        return (max(1.0, _linear(self.points, shape.size)) if ticks is None else ticks) * self.tick_s


def _ticks(costs: StageCosts, kind: Kind) -> int | None:
    return {
        Kind.F: costs.forward_ticks,
        Kind.B: costs.backward_ticks,
        Kind.I: costs.input_grad_ticks,
        Kind.W: costs.weight_grad_ticks,
    }[kind]


def _apart(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The means of those that are closer than `_APART` to the smallest of them. points: ascending."""
    near: list[list[tuple[float, float]]] = []
    for point in points:
        if near and point[0] < _APART * near[-1][0][0]:
            near[-1].append(point)
        else:
            near.append([point])
    return [(statistics.fmean(at for at, _ in own), statistics.fmean(value for _, value in own)) for own in near]


def _linear(points: Sequence[tuple[float, float]], size: int) -> float:
    """The value at `size` of the lines through neighbouring points, of which the outer two go on."""
    if len(points) == 1:
        return points[0][1] * size / points[0][0]
    right = next((index for index, (at, _) in enumerate(points[1:-1], 1) if at >= size), len(points) - 1)
    (size_0, value_0), (size_1, value_1) = points[right - 1], points[right]
    return value_0 + (value_1 - value_0) * (size - size_0) / (size_1 - size_0)


def operation_name(problem: Problem, op: Op) -> str:
    """The operation for people: `F actor.0.3` is the forward of the actor's stage 0 on micro-batch 3."""
    return f"{op.kind} {problem.pipelines[op.pipeline].name}.{op.stage}.{op.micro_batch}"


def evaluate_seconds(schedule: Schedule, seconds: Mapping[Op, float], transfer_s: Sequence[float]) -> Timing:
    """The timing of a schedule's order, in microseconds; transfer_s: of a message, by pipeline."""
    of_messages = [round(one / _TICK_S) for one in transfer_s]
    rank_of = schedule.problem.rank_of

    def transfer_ticks(source: Op, target: Op) -> int:
        return 0 if rank_of(source) == rank_of(target) else of_messages[source.pipeline]

    return evaluate(schedule, lambda op: max(1, round(seconds[op] / _TICK_S)), transfer_ticks)
