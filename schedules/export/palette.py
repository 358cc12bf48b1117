"""How operations look in every drawing: models differ in colour and pattern, kinds in lightness."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.ir import Kind

KIND_NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient"}

INK = "#1f2430"  # text, critical path
MUTED = "#6b7280"  # axes, limits
SPACE = "#f1f2f5"  # where a rank is idle
MEMORY = "#8b93a3"


@dataclass(frozen=True, slots=True)
class Look:
    """Fill and text colour, and a pattern drawn over the fill in `line`: `hatch` numbers it, 0 for none."""

    fill: str
    line: str
    text: str
    hatch: int


# Light to dark; hues that people with any common colour blindness tell apart.
_FORWARD = ("#bcd9f2", "#fdd3a1", "#bfe5cb", "#dccbec", "#f6c6d3", "#d9d5b4")
_WEIGHT = ("#7fb2e0", "#f7a65a", "#7cc795", "#b596d6", "#e58fa8", "#b3ac70")
_INPUT = ("#3b7fc0", "#dd6f1c", "#359560", "#8455b3", "#c04d70", "#857d3a")
_BACKWARD = ("#2465a5", "#c05a10", "#23794a", "#6d3f9c", "#a43759", "#6b6427")
_FILLS = {Kind.F: _FORWARD, Kind.W: _WEIGHT, Kind.I: _INPUT, Kind.B: _BACKWARD}
NUM_HATCHES = 4


def look(pipeline: int, kind: Kind) -> Look:
    """The look of a pipeline's operations; pipelines beyond the colours take them again with another pattern."""
    number = pipeline % len(_FORWARD)
    is_dark = kind in (Kind.I, Kind.B)
    hatch = (pipeline + pipeline // len(_FORWARD)) % NUM_HATCHES
    line = _FILLS[Kind.W][number] if is_dark or kind is Kind.F else _FILLS[Kind.B][number]
    return Look(_FILLS[kind][number], line, "#ffffff" if is_dark else INK, hatch)
