"""A schedule as an interactive page: zoom, hover, switch parts on and off. One file, which needs no network.

Source of the drawing: plotly; of its script, the copy inside the plotly package.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING, Any

from schedules.export.chart import TICKS, Bar, Chart, Units, chart
from schedules.export.extras import require
from schedules.export.palette import INK, KIND_NAMES, MEMORY, MUTED, SPACE, look
from schedules.ir import Kind, Schedule
from schedules.timing import Timing

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_PATTERNS = ("", "/", "x", "-")
_BAND_PIXELS, _BAND_PIXELS_OVER_MEMORY, _FRAME_PIXELS = 46, 74, 190
_MAX_PIXELS = 2400
FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"


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
        ValueError: plotly is not installed, or the schedule has no times.
    """
    require("plotly")
    from plotly.graph_objects import Figure

    drawn = chart(schedule, executed=executed, planned=planned, units=units)
    drawing = Figure([*_bars(drawn), *_memory(drawn), *_critical_path(drawn)])
    end = drawn.makespan * units.time_per_tick
    band = _BAND_PIXELS_OVER_MEMORY if drawn.memory or drawn.planned else _BAND_PIXELS
    drawing.update_layout(
        title={
            "text": f"<b>{escape(title)}</b>",
            "subtitle": {"text": drawn.summary},
            "x": 0.01,
            "xanchor": "left",
            "y": 0.99,
            "yanchor": "top",
            "pad": {"t": 12},
        },
        font={"family": FONT, "color": INK, "size": 13},
        height=min(_MAX_PIXELS, _FRAME_PIXELS + band * schedule.problem.num_ranks),
        margin={"l": 20, "r": 24, "t": 76, "b": 96},
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
            "y": 0,
            "yanchor": "bottom",
            "x": 0.01,
            "yref": "container",
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
        fixedrange=True,
        showgrid=False,
        zeroline=False,
        automargin=True,
    )
    return drawing


def page(drawing: Figure) -> str:
    """The figure as one HTML document that carries plotly's script with it."""
    config = {"displaylogo": False, "scrollZoom": True, "responsive": True}
    document: str = drawing.to_html(include_plotlyjs=True, full_html=True, config=config, div_id="schedule")
    title = str(drawing.layout.title.text).removeprefix("<b>").removesuffix("</b>")  # escaped already
    head = f'<head><title>{title}</title><link rel="icon" href="data:,">'
    return document.replace("<html>", '<html lang="en">', 1).replace("<head>", head, 1)


def _bars(drawn: Chart) -> list[Any]:
    """A trace per pipeline and kind, so that each has an entry in the legend; those planned only are paler."""
    from plotly.graph_objects import Bar as BarTrace

    groups: defaultdict[tuple[bool, int, Kind], list[Bar]] = defaultdict(list)
    for only_planned, bar in drawn.every_bar():
        groups[only_planned, bar.op.pipeline, bar.op.kind].append(bar)
    planned_of = {bar.op: bar for bar in drawn.planned}
    kinds = list(KIND_NAMES)
    traces = []
    for only_planned, pipeline, kind in sorted(groups, key=lambda key: (key[0], key[1], kinds.index(key[2]))):
        bars = groups[only_planned, pipeline, kind]
        style = look(pipeline, kind)
        scale = drawn.units.time_per_tick
        name = f"{drawn.problem.pipelines[pipeline].name} {KIND_NAMES[kind]}"
        traces.append(
            BarTrace(
                name=name,
                legendgroup="planned" if only_planned else name,
                showlegend=not only_planned,
                orientation="h",
                base=[bar.start * scale for bar in bars],
                x=[(bar.end - bar.start) * scale for bar in bars],
                y=[bar.middle for bar in bars],
                width=[bar.bottom - bar.top for bar in bars],
                text=[bar.label for bar in bars],
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                insidetextfont={"color": style.text},
                hovertext=["<br>".join(_hover(drawn, bar, planned_of.get(bar.op), only_planned)) for bar in bars],
                hovertemplate="%{hovertext}<extra></extra>",
                marker={
                    "color": style.fill,
                    "line": {"color": "white", "width": drawn.edge},
                    "pattern": {
                        "shape": _PATTERNS[style.hatch],
                        "fgcolor": style.line,
                        "bgcolor": style.fill,
                        "size": 7,
                        "solidity": 0.22,
                    },
                },
                opacity=0.55 if only_planned else 1.0,
            )
        )
    return traces


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
    return [
        Scatter(
            name="critical path",
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode="lines",
            line={"color": INK, "width": 3},
            hoverinfo="skip",
        )
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
