"""Page and picture show every operation where the evaluator has it, and need nothing but themselves."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest

from schedules import Kind, Pipeline, Problem, Schedule, evaluate
from schedules.baselines import one_f_one_b
from schedules.critical_path import critical_path
from schedules.export import html, svg
from schedules.export.chart import Units, chart
from schedules.export.overview import blocks, is_crowded
from schedules.export.palette import look
from schedules.fused.greedy import greedy
from schedules.instances import actor_and_critic

WHEN = ("planned", "executed")


def test_bars_lie_where_operations_run(fused: Schedule) -> None:
    drawn, timing = chart(fused), evaluate(fused)
    assert [(bar.rank, bar.op) for bar in drawn.bars] == list(fused.ops())
    assert max(bar.end for bar in drawn.bars) == drawn.makespan == timing.makespan
    assert {bar.op for bar in drawn.bars if bar.is_critical} == set(critical_path(fused))
    for bar in drawn.bars:
        assert bar.rank < bar.top < bar.bottom < bar.rank + 1
    assert drawn.summary == f"makespan {timing.makespan} ticks, {timing.bubble_ratio:.1%} idle, peak memory 7"


def test_memory_is_under_its_rank_and_below_its_limit(fused: Schedule) -> None:
    drawn = chart(fused)
    for rank, curve in enumerate(drawn.memory):
        assert max(curve.levels) == evaluate(fused).peak_bytes[rank]
        assert curve.levels[0] == curve.levels[-1] == 0
        bars_end = max(bar.bottom for bar in drawn.bars if bar.rank == rank)
        assert curve.limit_height is not None
        assert bars_end < curve.limit_height <= min(curve.heights) <= max(curve.heights) == curve.floor < rank + 1


def test_without_memory_figures_there_is_no_curve(split: Schedule) -> None:
    drawn = chart(split)
    assert not drawn.memory
    assert "memory" not in drawn.summary


def test_a_bar_says_what_when_and_how_much(fused: Schedule) -> None:
    drawn = chart(fused, units=Units(time_per_tick=0.5, time="ms", memory_per_byte=2, memory="MB"))
    assert drawn.describe(drawn.bars[0])[:4] == (
        "F actor.0.0",
        "forward of actor, stage 0, micro-batch 0",
        "rank 0, 0 ms to 1 ms (1 ms)",
        "memory of the rank from then on: 4 MB",
    )


def test_plan_and_execution_have_a_lane_each(fused: Schedule) -> None:
    timing = evaluate(fused)
    late = replace(
        timing, end=tuple(tuple(end + 1 for end in ends) for ends in timing.end), makespan=timing.makespan + 1
    )
    drawn = chart(fused, executed=late, planned=timing)
    assert [name for _, name in drawn.lanes] == ["rank 0 planned", "executed", "rank 1 planned", "executed"]
    for planned, executed in zip(drawn.planned, drawn.bars, strict=True):
        assert planned.op == executed.op
        assert planned.bottom < executed.top
        assert planned.end == executed.end - 1


def test_hovering_over_what_ran_tells_the_plan(fused: Schedule) -> None:
    timing = evaluate(fused)
    late = replace(timing, end=tuple(tuple(end + 1 for end in ends) for ends in timing.end))
    drawing: Any = html.figure(fused, executed=late, planned=timing)
    texts = [text for trace in drawing.data if trace.type == "bar" for text in trace.hovertext]
    planned, executed = (next(text for text in texts if f"F actor.0.0</b>, {state}" in text) for state in WHEN)
    assert "0 ticks to 2 ticks" in planned
    assert "rank 0, 0 ticks to 3 ticks" in executed
    assert executed.endswith("planned: 0 ticks to 2 ticks")


def test_what_was_not_planned_has_one_lane(fused: Schedule) -> None:
    timing = evaluate(fused)
    late = replace(timing, makespan=timing.makespan + 1)
    drawn = chart(fused, executed=late)
    assert [name for _, name in drawn.lanes] == ["rank 0", "rank 1"]
    assert not drawn.planned
    assert drawn.summary.startswith(f"executed {timing.makespan + 1} ticks")


def test_models_and_kinds_differ_without_colour() -> None:
    def lightness(fill: str) -> float:
        red, green, blue = (int(fill[index : index + 2], 16) for index in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for pipeline in range(8):
        forward, weight, backward = (lightness(look(pipeline, kind).fill) for kind in (Kind.F, Kind.W, Kind.B))
        assert forward > weight + 20 > backward + 40
        assert look(pipeline, Kind.F).hatch != look(pipeline + 1, Kind.F).hatch
    assert len({(look(number, Kind.F).fill, look(number, Kind.F).hatch) for number in range(12)}) == 12


def test_the_page_needs_no_network(fused: Schedule) -> None:
    text = html.page(html.figure(fused, title="Two <models>"))
    assert "<title>Two &lt;models&gt;</title>" in text
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?!data:)", text)
    assert len(text) > 3_000_000, "plotly's script is part of the page"


def test_the_page_has_an_entry_per_model_and_kind(split: Schedule) -> None:
    drawing: Any = html.figure(split)
    named = [trace.name for trace in drawing.data if trace.type == "bar"]
    assert named == [
        f"{model} {kind}" for model in ("actor", "critic") for kind in ("forward", "input gradient", "weight gradient")
    ]
    assert sum(len(trace.x) for trace in drawing.data if trace.type == "bar") == sum(map(len, split.ranks))
    assert [trace.name for trace in drawing.data][-1] == "critical path"


def test_the_picture_is_svg_with_its_text_as_text(fused: Schedule) -> None:
    drawing = svg.figure(fused, title="Two models")
    text = svg.document(drawing)
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in ("Two models", "rank 0", "rank 1", "actor forward", "critic backward", "memory limit", "critical path"):
        assert word in words
    assert words.count("2") >= 8  # the third micro-batch: both models, both kinds, both stages
    assert svg.document(svg.figure(fused, title="Two models")) == text, "the same figure gives the same file"


def test_what_does_not_fit_its_bar_is_not_written() -> None:
    many = Pipeline(name="p", ranks=(0,), num_micro_batches=1200, forward_ticks=(1,), backward_ticks=(2,))
    drawing: Any = svg.figure(one_f_one_b(Problem(num_ranks=1, pipelines=(many,))))
    assert not [text for text in drawing.axes[0].texts if text.get_text().isdigit()]


@pytest.mark.parametrize("module", ["html", "svg"])
def test_an_empty_schedule_is_drawn(module: str, problem: Problem) -> None:
    empty = Schedule(problem, ((), ()))
    assert html.figure(empty) if module == "html" else svg.document(svg.figure(empty))


def test_libraries_are_loaded_only_to_draw() -> None:
    program = (
        "import sys; from schedules.export import chart, chrome, html, pipelining, svg; "
        "sys.exit(bool({'plotly', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd="/").returncode == 0


def test_edges_of_many_bars_do_not_cover_them(fused: Schedule) -> None:
    many = Pipeline(name="p", ranks=(0,), num_micro_batches=300, forward_ticks=(1,), backward_ticks=(2,))
    assert chart(fused).edge == 1
    assert chart(one_f_one_b(Problem(num_ranks=1, pipelines=(many,)))).edge == 0.2


@pytest.fixture(scope="module")
def crowded() -> Schedule:
    """Sixteen ranks, two models of 64 micro-batches: operations of a pixel or two."""
    instance = actor_and_critic(
        actor_stages=16,
        critic_stages=16,
        actor_microbatches=64,
        critic_microbatches=64,
        actor_forward=2,
        critic_forward=2,
        actor_activation=1,
        critic_activation=1,
    )
    return greedy(instance.problem)


def test_slices_of_time_hold_what_operations_take(crowded: Schedule, fused: Schedule) -> None:
    drawn, timing = chart(crowded), evaluate(crowded)
    assert is_crowded(drawn, 700)
    assert not is_crowded(drawn, 10_000)
    assert not is_crowded(chart(fused), 700)
    found = blocks(drawn, 700)
    assert len(found) < len(drawn.bars) * 2
    for rank in range(16):
        of_rank = [block for block in found if block.rank == rank]
        ticks = sum(block.share * (block.end - block.start) for block in of_rank)
        assert ticks == pytest.approx(timing.busy_ticks[rank])
        lane = next((bar.top, bar.bottom) for bar in drawn.bars if bar.rank == rank)
        assert all(lane[0] - 1e-9 <= block.top <= block.bottom <= lane[1] + 1e-9 for block in of_rank)
    assert max(block.end for block in found) <= drawn.makespan


def test_a_crowded_picture_is_drawn_in_slices(crowded: Schedule) -> None:
    drawing: Any = svg.figure(crowded)
    axes = drawing.axes[0]
    assert not [text for text in axes.texts if text.get_text().isdigit()]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:4] == ["actor forward", "actor backward", "critic forward", "critic backward"]
    assert len(axes.collections) < 16 * 2 + 8, "no outlines of single operations"


def test_a_crowded_page_shows_operations_once_it_is_zoomed(crowded: Schedule, fused: Schedule) -> None:
    drawing: Any = html.figure(crowded, overview=True)
    levels = {trace.meta for trace in drawing.data if trace.visible is not False and trace.type == "bar"}
    assert levels == {"overview"}
    hidden = [trace for trace in drawing.data if trace.meta == "operations"]
    assert sum(len(trace.x) for trace in hidden) == sum(map(len, crowded.ranks))
    assert "plotly_relayout" in html.page(drawing)
    plain: Any = html.figure(fused, overview=True)
    assert not [trace for trace in plain.data if trace.meta]


def test_the_legend_is_above_what_it_explains(fused: Schedule) -> None:
    page: Any = html.figure(fused)
    assert (page.layout.legend.y, page.layout.legend.yanchor) == (1, "bottom")
    picture: Any = svg.figure(fused)
    picture.draw_without_rendering()
    (axes,) = picture.axes
    legend, title = axes.get_legend().get_window_extent(), axes.title.get_window_extent()
    (summary,) = [text for text in axes.texts if text.get_text().startswith("makespan")]
    assert axes.bbox.y1 <= legend.y0
    assert legend.y1 <= summary.get_window_extent().y0 <= summary.get_window_extent().y1 <= title.y0


def test_between_ranks_the_critical_path_is_a_hairline(fused: Schedule) -> None:
    drawing: Any = html.figure(fused)
    between, along = (trace for trace in drawing.data if trace.name == "critical path")
    assert between.line.width < 1 < along.line.width
    segments = list(zip(along.x, along.y, strict=True))
    assert all(y0 == y1 for (_, y0), (_, y1) in zip(segments[::3], segments[1::3], strict=True))
    assert set(segments[2::3]) == {(None, None)}


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (7, "7"),
        (123_456, "123,456"),
        (13_915_200, "13.9 MB"),
        (123_456_789, "123 MB"),
        (80 * 10**9, "80 GB"),
        (2 * 10**15, "2 PB"),
    ],
)
def test_memory_has_a_unit_and_no_exponent(num_bytes: int, text: str) -> None:
    assert Units().memory_text(num_bytes) == text


def test_times_have_no_exponent() -> None:
    assert Units().time_text(13_915_234) == "13,915,234 ticks"
    assert Units().time_text(0.5) == "0.5 ticks"
