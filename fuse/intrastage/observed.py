"""What stages cost, learnt from the operations that training has run anyway: nothing is run to be measured."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts, TransferCosts
from fuse.trace import Span
from schedules import Kind

TRAIN, MEMORY, MESSAGE = "train", "memory", "message"
"""Categories of the spans that tell costs: an operation; the bytes of a micro-batch; a message to the next stage."""

_REMEMBERED = 64
"""Costs are fitted to the last so many operations of each kind and stage."""
_FEWEST_FOR_A_LINE = 6
_TICK_S = 1e-5

_Stage = tuple[str, int]
"""Pipeline and stage."""


class ObservedCosts:
    """Costs of all stages and messages, from spans of all ranks.

    names: what a profile calls the pipelines that spans name.
    forward_only: those of a profile that have no backwards, and whose messages are like theirs.
    """

    def __init__(self, names: Mapping[str, str], forward_only: Mapping[str, str] = MappingProxyType({})) -> None:
        self._names, self._forward_only = names, forward_only
        self._operations: defaultdict[tuple[_Stage, Kind], deque[tuple[int, float]]] = defaultdict(
            lambda: deque(maxlen=_REMEMBERED)
        )
        self._messages: defaultdict[_Stage, dict[Shape, float]] = defaultdict(dict)
        self._memory: dict[_Stage, tuple[int, int, int]] = {}  # tokens, bytes from F to I, bytes from I to W
        self._input_shares: dict[_Stage, float] = {}  # I's of a backward, where both halves were seen

    def add(self, spans: Iterable[Span]) -> None:
        """Learn from spans; those of other categories are passed over."""
        operations: defaultdict[str, deque[Span]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        for span in spans:
            if span.category == TRAIN:
                operations[span.name.rpartition(".")[0]].append(span)
            elif span.category == MESSAGE:
                _, stage = self._stage(span)
                self._messages[stage][_shape(span)] = span.duration_s
            elif span.category == MEMORY:
                _, stage = self._stage(span)
                self._memory[stage] = (
                    _integer(span, "tokens"),
                    _bytes(span, "activation"),
                    _bytes(span, "weight_grad"),
                )
        for last in operations.values():
            what, stage = self._stage(last[0])
            self._operations[stage, Kind(what)].extend((_integer(span, "tokens"), span.duration_s) for span in last)

    def _stage(self, span: Span) -> tuple[str, _Stage]:
        """What the span is of, and the stage."""
        what, _, operation = span.name.partition(" ")
        pipeline, number, _ = operation.rsplit(".", 2)
        return what, (self._names[pipeline], int(number))

    def forget(self) -> None:
        """Forget the operations, but remember I's share of a backward: the next schedule may run none in halves."""
        for stage in self._stages:
            if {(stage, Kind.I), (stage, Kind.W)} <= self._operations.keys():
                seconds = self._seconds(stage, Shape(1, 1024))
                self._input_shares[stage] = seconds[Kind.I] / (seconds[Kind.I] + seconds[Kind.W])
        self._operations.clear()

    def profile(self, shapes: Iterable[Shape]) -> Profile | None:
        """Costs on micro-batches of these shapes; None before `is_complete`.

        A backward that only ran in halves costs as much as both. Memory is in proportion to tokens, and 0 where no span
        told of it.
        """
        if not self.is_complete:
            return None
        stages, shapes = self._stages, sorted(set(shapes))
        return Profile(
            tick_s=_TICK_S,
            stages=tuple(self._costs(stage, shape) for stage in sorted(stages) for shape in shapes),
            transfers=tuple(
                TransferCosts(pipeline=pipeline, stage=stage, shape=shape, ticks=_ticks(seconds))
                for like, stage in sorted(self._messages)
                for pipeline in self._with_messages_like(like)
                for shape, seconds in sorted(self._messages[like, stage].items())
            ),
        )

    @property
    def least_tokens(self) -> int | None:
        """Of the smallest operations that every stage showed; None where sizes are too alike to tell what they cost."""
        if not self.is_complete or not all(_is_line(_warm(points)) for points in self._operations.values()):
            return None
        return max(min(tokens for tokens, _ in points) for points in self._operations.values())

    @property
    def pipelines(self) -> frozenset[str]:
        """Those that a profile would have."""
        return frozenset(pipeline for pipeline, _ in self._stages) if self.is_complete else frozenset()

    @property
    def is_complete(self) -> bool:
        """Whether every stage was seen running F and a backward."""
        return bool(self._stages) and all(map(self._is_known, self._stages))

    @property
    def _stages(self) -> set[_Stage]:
        return {stage for stage, _ in self._operations}

    def _is_known(self, stage: _Stage) -> bool:
        has = {kind for seen, kind in self._operations if seen == stage}
        return Kind.F in has and (stage[0] in self._forward_only or Kind.B in has or {Kind.I, Kind.W} <= has)

    def _with_messages_like(self, pipeline: str) -> list[str]:
        seen = {one for one, _ in self._stages}
        return [pipeline, *(one for one, like in self._forward_only.items() if like == pipeline and one in seen)]

    def _seconds(self, stage: _Stage, shape: Shape) -> dict[Kind, float]:
        seconds = {
            kind: max(_TICK_S, fixed_s + token_s * shape.size)
            for kind in Kind
            if (stage, kind) in self._operations
            for fixed_s, token_s in [fit(self._operations[stage, kind])]
        }
        if stage[0] in self._forward_only:
            return seconds
        if Kind.B not in seconds:
            seconds[Kind.B] = seconds[Kind.I] + seconds[Kind.W]
        elif stage in self._input_shares and not {Kind.I, Kind.W} <= seconds.keys():
            seconds[Kind.I] = self._input_shares[stage] * seconds[Kind.B]
            seconds[Kind.W] = seconds[Kind.B] - seconds[Kind.I]
        return seconds

    def _costs(self, stage: _Stage, shape: Shape) -> StageCosts:
        ticks = {kind: _ticks(one) for kind, one in self._seconds(stage, shape).items()}
        tokens, activation_bytes, weight_grad_bytes = self._memory.get(stage, (1, 0, 0))
        return StageCosts(
            pipeline=stage[0],
            stage=stage[1],
            shape=shape,
            forward_ticks=ticks[Kind.F],
            backward_ticks=ticks.get(Kind.B, 0),
            input_grad_ticks=ticks.get(Kind.I),
            weight_grad_ticks=ticks.get(Kind.W),
            activation_bytes=activation_bytes * shape.size // tokens,
            weight_grad_bytes=weight_grad_bytes * shape.size // tokens,
        )


def fit(points: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of an operation on no tokens, and per token, from (tokens, seconds) in the order they were measured.

    The median proportion where points are few or alike; else the line of least squares, with neither part negative.
    The first operation warms up what the others find warm, so its point counts only where there are no two others.
    """
    points = _warm(points)
    proportion = statistics.median(seconds / tokens for tokens, seconds in points)
    if not _is_line(points):
        return 0.0, proportion
    tokens, seconds = [float(x) for x, _ in points], [y for _, y in points]
    token_s, fixed_s = statistics.linear_regression(tokens, seconds)
    if token_s < 0:
        return statistics.fmean(seconds), 0.0
    return (0.0, proportion) if fixed_s < 0 else (fixed_s, token_s)


def _warm(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    points = list(points)
    return points[1:] if len(points) > 2 else points


def _is_line(points: Iterable[tuple[int, float]]) -> bool:
    tokens = [tokens for tokens, _ in points]
    return len(tokens) >= _FEWEST_FOR_A_LINE and max(tokens) >= 1.5 * min(tokens)


def drift_of(spans: Iterable[Span]) -> float | None:
    """How far a stage's executed over planned time is from the median stage's; None without planned operations.

    A machine that is slower all over changes no schedule, so only the proportions between stages count.
    """
    executed: defaultdict[str, float] = defaultdict(float)
    planned: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        start_s, end_s = span.arguments.get("planned_start_s"), span.arguments.get("planned_end_s")
        if isinstance(start_s, float) and isinstance(end_s, float):
            stage = span.name.rpartition(".")[0]
            executed[stage] += span.duration_s
            planned[stage] += end_s - start_s
    ratios = [executed[stage] / planned[stage] for stage in planned if planned[stage] > 0]
    if not ratios:
        return None
    typical = statistics.median(ratios)
    return max(abs(ratio / typical - 1) for ratio in ratios)


def shape_arguments(shape: Shape) -> dict[str, object]:
    """The arguments of a span that tells what a micro-batch of this shape costs."""
    return {"tokens": shape.size, "sequences": shape.num_sequences}


def _shape(span: Span) -> Shape:
    tokens, sequences = _integer(span, "tokens"), _integer(span, "sequences")
    return Shape(sequences, tokens // sequences)


def _bytes(span: Span, name: str) -> int:
    return _integer(span, f"{name}_bytes")


def _integer(span: Span, name: str) -> int:
    value = span.arguments[name]
    assert isinstance(value, int), f"{span.name} says {name}={value!r}"
    return value


def _ticks(seconds: float) -> int:
    return max(1, round(seconds / _TICK_S))


def one_of_each(shapes: Sequence[Shape]) -> tuple[Shape, Shape, Shape]:
    """The smallest, the median and the largest."""
    order = sorted(shapes, key=lambda shape: (shape.size, shape))
    return order[0], order[len(order) // 2], order[-1]
