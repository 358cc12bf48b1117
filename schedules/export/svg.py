"""A schedule as a still picture in SVG, for documents and talks; drawn by matplotlib, without a browser."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from schedules.export.chart import TICKS, Bar, Chart, Units, chart
from schedules.export.extras import require
from schedules.export.legend import Group, bars_by_kind, blocks_by_kind
from schedules.export.overview import Block, is_crowded
from schedules.export.palette import INK, MEMORY, MUTED, SPACE
from schedules.export.text import drawable
from schedules.ir import Schedule
from schedules.timing import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCHES = ("", "////", "xxxx", "----")
_BAND_INCHES, _BAND_INCHES_OVER_MEMORY, _FRAME_INCHES = 0.42, 0.72, 1.3
_MAX_INCHES = 40.0
_WIDTH_INCHES = 11.0
_LINES = ("memory", "memory limit", "critical path")
_LABEL_POINTS = 8.0
_PLOT_POINTS = 0.88 * 72 * _WIDTH_INCHES
_LEGEND_COLUMNS, _LEGEND_POINTS, _SUMMARY_POINTS = 7, 14.0, 16.0
_DIGIT_WIDTH = 0.72  # of a label's digit and its share of the margins, in font sizes
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fuse",  # the same figure gives the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "hatch.linewidth": 0.7,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
}


def figure(
    schedule: Schedule,
    *,
    title: str = "Pipeline schedule",
    executed: Timing | None = None,
    planned: Timing | None = None,
    units: Units = TICKS,
) -> Figure:
    """Draw a schedule; `executed` and `planned` as `chart` takes them.

    Raises:
        ValueError: matplotlib is not installed, or the schedule has no times.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = chart(schedule, executed=executed, planned=planned, units=units)
    num_ranks = schedule.problem.num_ranks
    band = _BAND_INCHES_OVER_MEMORY if drawn.memory or drawn.planned else _BAND_INCHES
    with mpl.rc_context(SETTINGS):
        drawing = Figure(
            figsize=(_WIDTH_INCHES, min(_MAX_INCHES, _FRAME_INCHES + band * num_ranks)), layout="constrained"
        )
        axes = drawing.subplots()
        axes.set_xlim(0, max(1, drawn.makespan) * units.time_per_tick)
        axes.set_ylim(num_ranks, 0)
        _draw_spaces(axes, drawn)
        if is_crowded(drawn, _PLOT_POINTS):
            _draw_blocks(axes, drawn)
        else:
            _draw_bars(axes, drawn, points_per_x=_PLOT_POINTS / (max(1, drawn.makespan) * units.time_per_tick))
        _draw_memory(axes, drawn)
        _draw_critical_path(axes, drawn)
        axes.set_yticks([middle for middle, _ in drawn.lanes], [name for _, name in drawn.lanes])
        axes.tick_params(axis="y", length=0, pad=6)
        axes.set_xlabel(units.time)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        above = _draw_legend(axes)
        pad = above + _SUMMARY_POINTS
        axes.set_title(drawable(title), loc="left", fontweight="bold", fontsize=12, pad=pad, parse_math=False)
        axes.annotate(
            drawn.summary, (0, 1), (0, above), xycoords="axes fraction", textcoords="offset points",
            va="bottom", fontsize=9.5, color=INK, annotation_clip=False,
        )  # fmt: skip
    return drawing


def document(drawing: Figure) -> str:
    """The figure as an SVG document; the same figure always gives the same text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(SETTINGS):
        drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _draw_spaces(axes: Axes, drawn: Chart) -> None:
    for top, bottom in sorted({(bar.top, bar.bottom) for _, bar in drawn.every_bar()}):
        axes.axhspan(top, bottom, color=SPACE, linewidth=0)


def _draw_blocks(axes: Axes, drawn: Chart) -> None:
    """What each rank does in slices of time, where operations would be too narrow to see."""
    for group in blocks_by_kind(drawn, _PLOT_POINTS):
        # Antialiased neighbours would show a hairline between them.
        _fill(axes, group, _boxes(group, drawn.units), antialiased=False)


def _draw_bars(axes: Axes, drawn: Chart, points_per_x: float) -> None:
    from matplotlib.collections import PolyCollection

    scale = drawn.units.time_per_tick
    for group in bars_by_kind(drawn):
        boxes = _boxes(group, drawn.units)
        _fill(axes, group, boxes)
        axes.add_collection(
            PolyCollection(boxes, facecolor="none", edgecolor="white", linewidth=0.8 * drawn.edge), autolim=False
        )
        for bar in group.shapes:
            if (bar.end - bar.start) * scale * points_per_x < _DIGIT_WIDTH * _LABEL_POINTS * len(bar.label):
                continue
            axes.text(
                (bar.start + bar.end) / 2 * scale,
                bar.middle,
                bar.label,
                ha="center",
                va="center_baseline",
                fontsize=_LABEL_POINTS,
                color=group.style.text,
                clip_on=True,
            )


def _fill(axes: Axes, group: Group[Bar] | Group[Block], boxes: Sequence[Any], **options: Any) -> None:
    from matplotlib.collections import PolyCollection

    axes.add_collection(
        PolyCollection(
            boxes,
            facecolor=group.style.fill,
            edgecolor=group.style.line,  # of the hatch
            hatch=_HATCHES[group.style.hatch] or None,
            linewidth=0,
            alpha=group.opacity if group.only_planned else None,
            label=None if group.only_planned else group.name,
            **options,
        ),
        autolim=False,
    )


def _boxes(group: Group[Bar] | Group[Block], units: Units) -> list[list[tuple[float, float]]]:
    scale = units.time_per_tick
    return [corners(shape.start * scale, shape.end * scale, shape.top, shape.bottom) for shape in group.shapes]


def corners(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    """Of a box."""
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _draw_legend(axes: Axes) -> float:
    """Operations first, whatever order they were drawn in; returns the points that it takes above the axes."""
    entries = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] in _LINES)
    if not entries:
        return 0.0
    handles, labels = zip(*entries, strict=True)
    axes.legend(
        handles, labels, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, ncols=_LEGEND_COLUMNS,
        frameon=False, handlelength=1.6, columnspacing=1.4, borderpad=0.3,
    )  # fmt: skip
    return 6 + _LEGEND_POINTS * -(-len(entries) // _LEGEND_COLUMNS)


def _draw_memory(axes: Axes, drawn: Chart) -> None:
    scale = drawn.units.time_per_tick
    for number, curve in enumerate(drawn.memory):
        ticks = [tick * scale for tick in curve.ticks]
        axes.fill_between(
            ticks,
            curve.heights,
            curve.floor,
            step="post",
            facecolor=MEMORY,
            alpha=0.3,
            linewidth=0,
            label=None if number else "memory",
        )
        axes.step(ticks, curve.heights, where="post", color=MEMORY, linewidth=1)
        if curve.limit_height is not None:
            axes.plot(
                [ticks[0], ticks[-1]],
                [curve.limit_height] * 2,
                color=MUTED,
                linewidth=0.8,
                linestyle=":",
                label=None if number else "memory limit",
            )


def _draw_critical_path(axes: Axes, drawn: Chart) -> None:
    """Along operations; from rank to rank it crosses memory curves, so there it is a hairline."""
    scale = drawn.units.time_per_tick
    points = [(tick * scale, bar.path_height) for bar in drawn.path for tick in (bar.start, bar.end)]
    axes.plot([x for x, _ in points], [y for _, y in points], color=INK, linewidth=0.5, alpha=0.45)
    segments = [
        (along * scale, height)
        for bar in drawn.path
        for along, height in ((bar.start, bar.path_height), (bar.end, bar.path_height), (math.nan, math.nan))
    ]
    axes.plot(
        [x for x, _ in segments],
        [y for _, y in segments],
        color=INK,
        linewidth=2.2,
        solid_capstyle="butt",
        label="critical path",
    )
