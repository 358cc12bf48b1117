"""A simulated rollout as a picture: samples as bars on their devices, migrations as arrows, inference in the tail.

matplotlib and plotly are imported only to draw.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fuse.interstage.rollout import SampleSpan, SimulationResult, SpanKind
from schedules.export.extras import require
from schedules.export.html import FONT
from schedules.export.palette import INK, MUTED, SPACE
from schedules.export.svg import SETTINGS, corners
from schedules.export.text import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture
    from plotly.graph_objects import Figure as Page

_STAYED, _MIGRATED, _INFERENCE = "#9cc4ea", "#1f5c99", "#f7a65a"
_INFERENCE_LINE = "#c05a10"
_SLOT_INCHES = 0.035
_WIDTH_INCHES = 11.0
_TOP, _BOTTOM = 0.08, 0.92  # of a device's band, y growing downwards
_MOST_EDGED = 16
"""Slots of a device whose bars have white edges: of more, these would be all that one sees, and pale every colour."""


@dataclass(frozen=True, slots=True)
class SampleBar:
    """A sample in the batch of a device: `top` to `bottom` is its slot."""

    span: SampleSpan
    top: float
    bottom: float
    is_migrated: bool

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2


@dataclass(frozen=True, slots=True)
class Block:
    """Inference of a device."""

    device: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class RolloutChart:
    """What there is to draw. `moves`: from the end of one bar to the start of another."""

    num_devices: int
    bars: tuple[SampleBar, ...]
    moves: tuple[tuple[SampleBar, SampleBar], ...]
    inference: tuple[Block, ...]
    num_slots: int
    summary: str

    def edge(self, width: float) -> float:
        """Of the line around a bar, where there is room for one."""
        return width if self.num_slots <= _MOST_EDGED else 0.0


def rollout_chart(result: SimulationResult) -> RolloutChart:
    """Lay a rollout out: on each device a sample takes the lowest slot that is free while it is there."""
    slots: dict[SampleSpan, int] = {}
    num_slots = 1
    for spans in _by_device(result.samples):
        free_at_s: list[float] = []
        for span in sorted(spans, key=lambda span: (span.start_s, -span.end_s, span.sample)):
            slot = next((slot for slot, end_s in enumerate(free_at_s) if end_s <= span.start_s), len(free_at_s))
            free_at_s[slot : slot + 1] = [span.end_s]
            slots[span] = slot
            num_slots = max(num_slots, slot + 1)
    by_sample: defaultdict[int, list[SampleSpan]] = defaultdict(list)
    for span in result.samples:
        by_sample[span.sample].append(span)
    height = (_BOTTOM - _TOP) / num_slots
    bars = {
        span: SampleBar(
            span,
            span.device + _TOP + height * slot,
            span.device + _TOP + height * (slot + 1),
            len(by_sample[span.sample]) > 1,
        )
        for span, slot in slots.items()
    }
    return RolloutChart(
        num_devices=len(result.timeline),
        bars=tuple(bars.values()),
        moves=tuple((bars[a], bars[b]) for spans in by_sample.values() for a, b in pairwise(spans)),
        inference=tuple(
            Block(device, span.start_s, span.end_s)
            for device, spans in enumerate(result.timeline)
            for span in spans
            if span.kind is SpanKind.INFER
        ),
        num_slots=num_slots,
        summary=f"{result.makespan_s:.4g} s, {result.idle_share:.1%} idle, {result.num_migrations} migrations",
    )


def picture(results: Mapping[str, SimulationResult]) -> Picture:
    """Draw rollouts above one another, to one scale of time, each under its name; `schedules.export.svg` writes it.

    Raises:
        ValueError: matplotlib is not installed.
    """
    require("matplotlib")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    charts = {name: rollout_chart(result) for name, result in results.items()}
    inches = sum(chart.num_devices * min(0.6, max(0.28, _SLOT_INCHES * chart.num_slots)) for chart in charts.values())
    with mpl.rc_context(SETTINGS):
        drawing = Figure(figsize=(_WIDTH_INCHES, 0.8 + 0.45 * len(charts) + inches), layout="constrained")
        panels = drawing.subplots(
            len(charts), 1, sharex=True, squeeze=False, height_ratios=[chart.num_devices for chart in charts.values()]
        )[:, 0]
        for axes, (name, chart) in zip(panels, charts.items(), strict=True):
            _draw(axes, chart)
            heading = drawable(f"{name}: {chart.summary}")
            axes.set_title(heading, loc="left", fontsize=10.5, fontweight="bold", parse_math=False)
        panels[-1].set_xlabel("seconds")
        panels[-1].set_xlim(0, max(result.makespan_s for result in results.values()))
        entries: dict[str, Any] = {}
        for axes in panels:
            entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        drawing.legend(entries.values(), entries, loc="outside upper left", ncols=4, frameon=False)
    return drawing


def _draw(axes: Axes, chart: RolloutChart) -> None:
    from matplotlib.collections import PolyCollection

    for device in range(chart.num_devices):
        axes.axhspan(device + _TOP, device + _BOTTOM, color=SPACE, linewidth=0)
    groups = {
        "sample generates": (_STAYED, [bar for bar in chart.bars if not bar.is_migrated]),
        "sample that is migrated": (_MIGRATED, [bar for bar in chart.bars if bar.is_migrated]),
    }
    for label, (colour, bars) in groups.items():
        boxes = [corners(bar.span.start_s, bar.span.end_s, bar.top, bar.bottom) for bar in bars]
        if boxes:
            axes.add_collection(
                PolyCollection(boxes, facecolor=colour, edgecolor="white", linewidth=chart.edge(0.25), label=label),
                autolim=False,
            )
    blocks = [
        corners(block.start_s, block.end_s, block.device + _TOP, block.device + _BOTTOM) for block in chart.inference
    ]
    axes.add_collection(
        PolyCollection(
            blocks, facecolor=_INFERENCE, edgecolor=_INFERENCE_LINE, hatch="////", linewidth=0, label="inference"
        ),
        autolim=False,
    )
    axes.add_collection(PolyCollection(blocks, facecolor="none", edgecolor="white", linewidth=0.6), autolim=False)
    for source, target in chart.moves:
        axes.annotate(
            "",
            xy=(target.span.start_s, target.middle),
            xytext=(source.span.end_s, source.middle),
            arrowprops={
                "arrowstyle": "-|>",
                "color": INK,
                "linewidth": 0.7,
                "mutation_scale": 7,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    axes.set_ylim(chart.num_devices, 0)
    axes.set_yticks([device + 0.5 for device in range(chart.num_devices)], list(map(_device, range(chart.num_devices))))
    axes.tick_params(axis="y", length=0)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def page(result: SimulationResult, *, title: str = "Rollout", end_s: float | None = None) -> Page:
    """Draw a rollout to zoom into; `end_s` is the time at the right edge (default: the makespan), to compare several.

    Raises:
        ValueError: plotly is not installed.
    """
    require("plotly")
    from plotly.graph_objects import Bar, Figure

    chart = rollout_chart(result)
    traces = []
    for label, colour, is_migrated in (
        ("sample generates", _STAYED, False),
        ("sample that is migrated", _MIGRATED, True),
    ):
        bars = [bar for bar in chart.bars if bar.is_migrated == is_migrated]
        traces.append(
            Bar(
                name=label,
                orientation="h",
                base=[bar.span.start_s for bar in bars],
                x=[bar.span.end_s - bar.span.start_s for bar in bars],
                y=[bar.middle for bar in bars],
                width=[bar.bottom - bar.top for bar in bars],
                hovertext=[
                    f"<b>sample {bar.span.sample}</b> on device {bar.span.device}<br>"
                    f"{bar.span.start_s:.4g} to {bar.span.end_s:.4g} s"
                    for bar in bars
                ],
                hovertemplate="%{hovertext}<extra></extra>",
                marker={"color": colour, "line": {"color": "white", "width": chart.edge(0.5)}},
            )
        )
    traces.append(
        Bar(
            name="inference",
            orientation="h",
            base=[block.start_s for block in chart.inference],
            x=[block.end_s - block.start_s for block in chart.inference],
            y=[block.device + 0.5 for block in chart.inference],
            width=[_BOTTOM - _TOP] * len(chart.inference),
            hovertext=[
                f"<b>inference</b> on device {block.device}<br>{block.start_s:.4g} to {block.end_s:.4g} s"
                for block in chart.inference
            ],
            hovertemplate="%{hovertext}<extra></extra>",
            marker={"color": _INFERENCE, "pattern": {"shape": "/", "fgcolor": _INFERENCE_LINE, "solidity": 0.2}},
        )
    )
    drawing = Figure(traces)
    drawing.update_layout(
        title={"text": f"<b>{escape(drawable(title))}</b>", "subtitle": {"text": chart.summary}, "x": 0.01},
        font={"family": FONT, "color": INK, "size": 13},
        height=190 + min(60, max(34, 4 * chart.num_slots)) * chart.num_devices,
        margin={"l": 20, "r": 24, "t": 120, "b": 52},
        barmode="overlay",
        bargap=0,
        plot_bgcolor="white",
        hovermode="closest",
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
        annotations=[_arrow(source, target) for source, target in chart.moves],
        shapes=[
            {
                "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": device + _TOP, "y1": device + _BOTTOM,
                "fillcolor": SPACE, "line": {"width": 0}, "layer": "below",
            }
            for device in range(chart.num_devices)
        ],
    )  # fmt: skip
    drawing.update_xaxes(title="seconds", range=[0, end_s or result.makespan_s], showgrid=False, linecolor=MUTED)
    drawing.update_yaxes(
        range=[chart.num_devices, 0],
        tickvals=[device + 0.5 for device in range(chart.num_devices)],
        ticktext=list(map(_device, range(chart.num_devices))),
        fixedrange=True,
        showgrid=False,
        zeroline=False,
    )
    return drawing


def _arrow(source: SampleBar, target: SampleBar) -> dict[str, Any]:
    return {
        "x": target.span.start_s, "y": target.middle, "ax": source.span.end_s, "ay": source.middle,
        "xref": "x", "yref": "y", "axref": "x", "ayref": "y", "text": "", "showarrow": True,
        "arrowhead": 2, "arrowsize": 1, "arrowwidth": 1.2, "arrowcolor": INK,
    }  # fmt: skip


def _by_device(spans: tuple[SampleSpan, ...]) -> Iterator[list[SampleSpan]]:
    devices: defaultdict[int, list[SampleSpan]] = defaultdict(list)
    for span in spans:
        devices[span.device].append(span)
    yield from devices.values()


def _device(device: int) -> str:
    return f"device {device}"
