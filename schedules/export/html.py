"""A schedule as an interactive page: zoom, hover, switch parts on and off. One file, which needs no network.

Source of the drawing: plotly; of its script, the copy inside the plotly package.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from schedules.export.chart import TICKS, Bar, Chart, Units, chart
from schedules.export.extras import require
from schedules.export.legend import Group, bars_by_kind, blocks_by_kind
from schedules.export.overview import LEAST_WIDTH, Block, is_crowded
from schedules.export.palette import INK, MEMORY, MUTED, SPACE, Look
from schedules.export.text import drawable
from schedules.ir import Schedule
from schedules.timing import Timing

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_PATTERNS = ("", "/", "x", "-")
_BAND_PIXELS, _BAND_PIXELS_OVER_MEMORY, _FRAME_PIXELS = 46, 74, 190
_PLOT_PIXELS = 1100.0  # of a page on an ordinary screen
_OVERVIEW, _OPERATIONS = "overview", "operations"
_MAX_PIXELS = 2400
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"


_SWITCH = """
const plot = document.getElementById('schedule');
let level = levels[0];
plot.on('plotly_relayout', () => {
  const axis = plot._fullLayout.xaxis;
  const wanted = typical * axis._length / (axis.range[1] - axis.range[0]) < least ? levels[0] : levels[1];
  if (wanted === level) return;
  const visible = new Map();
  plot.data.forEach(trace => { if (trace.meta === level) visible.set(trace.name + trace.opacity, trace.visible); });
  level = wanted;
  Plotly.restyle(plot, {visible: plot.data.map(trace =>
    trace.meta === level ? visible.get(trace.name + trace.opacity) ?? true
    : levels.includes(trace.meta) ? false : trace.visible ?? true)});
});
"""


def figure(
    schedule: Schedule,
    *,
    title: str = "Pipeline schedule",
    executed: Timing | None = None,
    planned: Timing | None = None,
    units: Units = TICKS,
    overview: bool = False,
) -> Figure:
    """Draw a schedule; `executed` and `planned` as `chart` takes them.

    overview: where operations would be too narrow to see, draw slices of time instead, in whose place `page` shows the
    operations once it is zoomed far enough.

    Raises:
        ValueError: plotly is not installed, or the schedule has no times.
    """
    require("plotly")
    from plotly.graph_objects import Figure

    drawn = chart(schedule, executed=executed, planned=planned, units=units)
    has_overview = overview and is_crowded(drawn, _PLOT_PIXELS)
    operations = _bars(drawn)
    if has_overview:
        for trace in operations:
            trace.update(visible=False, meta=_OPERATIONS)
        operations = [*_blocks(drawn), *operations]
    drawing = Figure([*operations, *_memory(drawn), *_critical_path(drawn)])
    end = drawn.makespan * units.time_per_tick
    band = _BAND_PIXELS_OVER_MEMORY if drawn.memory or drawn.planned else _BAND_PIXELS
    drawing.update_layout(
        title={
            "text": f"<b>{escape(drawable(title))}</b>",
            "subtitle": {"text": drawn.summary},
            "x": 0.01,
            "xanchor": "left",
            "y": 0.99,
            "yanchor": "top",
            "pad": {"t": 12},
        },
        font={"family": FONT, "color": INK, "size": 13},
        height=min(_MAX_PIXELS, _FRAME_PIXELS + band * schedule.problem.num_ranks),
        margin={"l": 20, "r": 24, "t": 120, "b": 52},
        barmode="overlay",
        bargap=0,
        plot_bgcolor="white",
        paper_bgcolor="white",
        hoverlabel={"align": "left", "font": {"family": FONT, "size": 13}},
        hovermode="closest",
        dragmode="zoom",
        uniformtext={"minsize": 9, "mode": "hide"},
        legend={
            "orientation": "h",
            "y": 1,
            "yanchor": "bottom",
            "x": 0,
            "groupclick": "toggleitem",
        },
        shapes=[_idle_space(lane_top, lane_bottom, end) for lane_top, lane_bottom in _lanes(drawn)],
    )
    drawing.update_xaxes(
        title={"text": units.time, "standoff": 4},
        range=[0, end],
        minallowed=0,
        maxallowed=end,
        showgrid=False,
        zeroline=False,
        ticks="outside",
        tickcolor=MUTED,
        linecolor=MUTED,
    )
    drawing.update_yaxes(
        range=[schedule.problem.num_ranks, 0],
        tickvals=[middle for middle, _ in drawn.lanes],
        ticktext=[name for _, name in drawn.lanes],
        ticklabelstandoff=8,  # or a label cut off at the edge reads on into the rank's
        linecolor=MUTED,
        fixedrange=True,
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    return drawing


def page(drawing: Figure) -> str:
    """The figure as one HTML document that carries plotly's script with it."""
    config = {"displaylogo": False, "scrollZoom": True, "responsive": True}
    document: str = drawing.to_html(
        include_plotlyjs=True, full_html=True, config=config, div_id="schedule", post_script=_script(drawing)
    )
    title = str(drawing.layout.title.text).removeprefix("<b>").removesuffix("</b>")  # escaped already
    head = f'<head><title>{title}</title><link rel="icon" href="data:,">'
    return document.replace("<html>", '<html lang="en">', 1).replace("<head>", head, 1)


def _script(drawing: Figure) -> list[str]:
    """Shows operations in place of slices while they are wide enough; what is switched off stays so."""
    ticks = sorted(width for trace in drawing.data if trace.meta == _OPERATIONS for width in trace.x)
    if not ticks:
        return []
    levels = f"const typical = {ticks[len(ticks) // 2]}, least = {LEAST_WIDTH}, levels = {[_OVERVIEW, _OPERATIONS]};"
    return [levels + _SWITCH]


def _blocks(drawn: Chart) -> list[Any]:
    """A trace per pipeline and kind with its shares of slices of time."""
    time_text = drawn.units.time_text
    traces = []
    for group in blocks_by_kind(drawn, _PLOT_PIXELS):
        hovertext = [
            f"<b>{group.name}</b>, {block.share:.0%} of rank {block.rank}<br>{time_text(block.start)} to "
            f"{time_text(block.end)}; zoom in to see operations"
            for block in group.shapes
        ]
        traces.append(_trace(group, drawn.units, hovertext, edge=0.0, meta=_OVERVIEW, visible=True))
    return traces


def _bars(drawn: Chart) -> list[Any]:
    """A trace per pipeline and kind, so that each has an entry in the legend; those planned only are paler."""
    planned_of = {bar.op: bar for bar in drawn.planned}
    traces = []
    for group in bars_by_kind(drawn):
        hovertext = [
            "<br>".join(_hover(drawn, bar, planned_of.get(bar.op), group.only_planned)) for bar in group.shapes
        ]
        labels = {
            "text": [bar.label for bar in group.shapes],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "insidetextfont": {"color": group.style.text},
        }
        traces.append(_trace(group, drawn.units, hovertext, edge=drawn.edge, **labels))
    return traces


def _trace(group: Group[Bar] | Group[Block], units: Units, hovertext: list[str], *, edge: float, **options: Any) -> Any:
    """Boxes of one look, with white lines of width `edge` around them."""
    from plotly.graph_objects import Bar as BarTrace

    scale, shapes = units.time_per_tick, group.shapes
    return BarTrace(
        name=group.name,
        legendgroup="planned" if group.only_planned else group.name,
        showlegend=not group.only_planned,
        orientation="h",
        base=[shape.start * scale for shape in shapes],
        x=[(shape.end - shape.start) * scale for shape in shapes],
        y=[(shape.top + shape.bottom) / 2 for shape in shapes],
        width=[shape.bottom - shape.top for shape in shapes],
        hovertext=hovertext,
        hovertemplate="%{hovertext}<extra></extra>",
        marker=_marker(group.style, edge),
        opacity=group.opacity,
        **options,
    )


def _marker(style: Look, edge: float) -> dict[str, Any]:
    return {
        "color": style.fill,
        "line": {"color": "white", "width": edge},
        "pattern": {
            "shape": _PATTERNS[style.hatch],
            "fgcolor": style.line,
            "bgcolor": style.fill,
            "size": 7,
            "solidity": 0.22,
        },
    }


def _hover(drawn: Chart, bar: Bar, planned: Bar | None, only_planned: bool) -> list[str]:
    operation, *lines = drawn.describe(bar)
    state = "" if not drawn.planned else ", planned" if only_planned else ", executed"
    if planned is not None and not only_planned:
        lines.append(f"planned: {drawn.units.time_text(planned.start)} to {drawn.units.time_text(planned.end)}")
    return [f"<b>{operation}</b>{state}", *lines]


def _memory(drawn: Chart) -> list[Any]:
    from plotly.graph_objects import Scatter

    traces = []
    scale = drawn.units.time_per_tick
    for number, curve in enumerate(drawn.memory):
        ticks = [tick * scale for tick in curve.ticks]
        shared = {"name": "memory", "legendgroup": "memory", "mode": "lines", "xaxis": "x", "yaxis": "y"}
        traces.append(
            Scatter(
                **shared,
                x=[ticks[0], ticks[-1]],
                y=[curve.floor] * 2,
                line={"color": MEMORY, "width": 0.5},
                hoverinfo="skip",
                showlegend=False,
            )
        )
        traces.append(
            Scatter(
                **shared,
                x=ticks,
                y=curve.heights,
                line={"color": MEMORY, "width": 1.5, "shape": "hv"},
                fill="tonexty",
                fillcolor="rgba(139, 147, 163, 0.25)",
                hovertext=[drawn.units.memory_text(level) for level in curve.levels],
                hovertemplate=f"rank {curve.rank}: %{{hovertext}}<extra></extra>",
                showlegend=number == 0,
            )
        )
        if curve.limit is not None:
            traces.append(
                Scatter(
                    x=[ticks[0], ticks[-1]],
                    y=[curve.limit_height] * 2,
                    name="memory limit",
                    legendgroup="memory limit",
                    mode="lines",
                    line={"color": MUTED, "width": 1, "dash": "dot"},
                    hovertext=f"limit of rank {curve.rank}: {drawn.units.memory_text(curve.limit)}",
                    hoverinfo="text",
                    showlegend=number == 0,
                )
            )
    return traces


def _critical_path(drawn: Chart) -> list[Any]:
    from plotly.graph_objects import Scatter

    scale = drawn.units.time_per_tick
    points = [(tick * scale, bar.path_height) for bar in drawn.path for tick in (bar.start, bar.end)]
    ends = [(bar.start * scale, bar.end * scale, bar.path_height) for bar in drawn.path]
    shared = {"name": "critical path", "legendgroup": "critical path", "mode": "lines", "hoverinfo": "skip"}
    return [
        Scatter(  # from rank to rank, across memory curves
            **shared,
            x=[x for x, _ in points],
            y=[y for _, y in points],
            line={"color": INK, "width": 0.7},
            opacity=0.45,
            showlegend=False,
        ),
        Scatter(  # along operations
            **shared,
            x=[x for start, end, _ in ends for x in (start, end, None)],
            y=[y for _, _, height in ends for y in (height, height, None)],
            line={"color": INK, "width": 3},
        ),
    ]


def _lanes(drawn: Chart) -> set[tuple[float, float]]:
    return {(bar.top, bar.bottom) for _, bar in drawn.every_bar()}


def _idle_space(top: float, bottom: float, end: float) -> dict[str, Any]:
    return {
        "type": "rect",
        "x0": 0,
        "x1": end,
        "y0": top,
        "y1": bottom,
        "fillcolor": SPACE,
        "line": {"width": 0},
        "layer": "below",
    }
