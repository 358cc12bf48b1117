"""What has one entry in a drawing's legend: the operations of one kind of one model, or their shares of time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from schedules.export.chart import Bar, Chart
from schedules.export.overview import Block, blocks
from schedules.export.palette import KIND_NAMES, Look, look
from schedules.ir import Kind

_Shape = TypeVar("_Shape", Bar, Block)


@dataclass(frozen=True, slots=True)
class Group(Generic[_Shape]):
    """Shapes that look alike. name: of model and kind. only_planned: paler, and without an entry of their own."""

    name: str
    style: Look
    only_planned: bool
    shapes: list[_Shape]

    @property
    def opacity(self) -> float:
        return 0.55 if self.only_planned else 1.0


def bars_by_kind(drawn: Chart) -> list[Group[Bar]]:
    """Every operation."""
    return _grouped(drawn, ((planned, bar.op.pipeline, bar.op.kind, bar) for planned, bar in drawn.every_bar()))


def blocks_by_kind(drawn: Chart, width: float) -> list[Group[Block]]:
    """Shares of slices of time, at this width of the whole chart."""
    found = blocks(drawn, width)
    return _grouped(drawn, ((block.only_planned, block.pipeline, block.kind, block) for block in found))


def _grouped(drawn: Chart, shapes: Iterable[tuple[bool, int, Kind, _Shape]]) -> list[Group[_Shape]]:
    groups: defaultdict[tuple[bool, int, Kind], list[_Shape]] = defaultdict(list)
    for only_planned, pipeline, kind, shape in shapes:
        groups[only_planned, pipeline, kind].append(shape)
    kinds = list(KIND_NAMES)
    return [
        Group(
            f"{drawn.problem.pipelines[pipeline].name} {KIND_NAMES[kind]}",
            look(pipeline, kind),
            only_planned,
            groups[only_planned, pipeline, kind],
        )
        for only_planned, pipeline, kind in sorted(groups, key=lambda key: (key[0], key[1], kinds.index(key[2])))
    ]
