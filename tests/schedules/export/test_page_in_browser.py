"""The page in a real browser: no errors, no requests, hover, zoom, and a picture with every operation in its place."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from schedules import Schedule
from schedules.export import html
from schedules.export.chart import Chart, chart
from schedules.export.palette import INK, look
from schedules.fused.greedy import greedy
from schedules.instances import actor_and_critic

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package: make setup")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

PATIENCE_MS = 120_000  # machines that run tests may be busy
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=PATIENCE_MS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def opened(browser: Any, fused: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[str]]]:
    """The schedule's page, and what it complains of or asks for."""
    path = tmp_path_factory.mktemp("page") / "schedule.html"
    path.write_text(html.page(html.figure(fused, title="Two models")), encoding="utf-8")
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 1200, "height": 500}, device_scale_factor=1)
    opened.set_default_timeout(PATIENCE_MS)
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: complaints.append(request.url) if request.url[:4] == "http" else None)
    opened.goto(path.as_uri())
    opened.wait_for_function("document.querySelectorAll('.barlayer .point path').length > 0")
    opened.locator(".draglayer .nsewdrag").first.wait_for(state="attached")  # what the mouse is over
    opened.evaluate("plot = document.getElementById('schedule'), first = structuredClone([plot.data, plot.layout])")
    yield opened, complaints
    opened.close()


@pytest.fixture
def page(opened: tuple[Any, list[str]]) -> Iterator[Any]:
    """The schedule's page as it is drawn first; the test fails if the page has complained or asked for anything."""
    page, complaints = opened
    page.mouse.move(5, 5)
    page.evaluate("document.querySelector('.plotly-notifier')?.remove()")  # how to zoom out again, over the plot
    page.evaluate("Plotly.react(plot, ...structuredClone(first))")
    yield page
    assert not complaints


@pytest.fixture
def drawn(fused: Schedule) -> Chart:
    return chart(fused)


def plot_area(page: Any) -> tuple[float, float, float, float]:
    """Left, top, width and height of where operations are drawn, in pixels."""
    box = page.locator(".plot-container .bglayer .bg, .plot-container .nsewdrag").first.bounding_box()
    return box["x"], box["y"], box["width"], box["height"]


def position(page: Any, drawn: Chart, tick: float, height: float) -> tuple[float, float]:
    left, top, width, pixels = plot_area(page)
    return left + width * tick / drawn.makespan, top + pixels * height / drawn.problem.num_ranks


def test_hover_names_the_operation(page: Any, drawn: Chart) -> None:
    assert page.title() == "Two models"
    for bar in (drawn.bars[0], drawn.bars[-1]):
        page.mouse.move(*position(page, drawn, (bar.start + bar.end) / 2, bar.middle))
        label = page.locator(".hoverlayer .hovertext").first
        label.wait_for()
        text = label.text_content()
        for line in drawn.describe(bar):
            assert line in text
        page.mouse.move(5, 5)
        page.wait_for_function("!document.querySelector('.hoverlayer .hovertext')")


def test_zoom_shows_a_part(page: Any, drawn: Chart) -> None:
    y = drawn.bars[0].middle
    page.mouse.move(*position(page, drawn, 4, y))
    page.mouse.down()
    page.mouse.move(*position(page, drawn, 12, y + 0.2), steps=4)
    page.mouse.up()
    page.wait_for_function("document.getElementById('schedule').layout.xaxis.range[0] > 1")
    low, high = page.evaluate("document.getElementById('schedule').layout.xaxis.range")
    assert (low, high) == (pytest.approx(4, abs=0.2), pytest.approx(12, abs=0.2))
    assert page.evaluate("document.getElementById('schedule').layout.yaxis.range") == [2, 0]


def test_a_kind_can_be_switched_off(page: Any, drawn: Chart) -> None:
    page.locator(".legend .traces .legendtoggle").first.click()
    page.wait_for_function("document.getElementById('schedule').data[0].visible == 'legendonly'")


def test_the_picture_has_every_operation_in_its_place(page: Any, drawn: Chart) -> None:
    """By structure: at each operation its model's and kind's colour, nothing where ranks idle, labels in the legend."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")

    def colours(left: int, right: int, top: int, bottom: int) -> set[str]:
        pixels = (picture.getpixel((x, y)) for x in range(left, right) for y in range(top, bottom))
        return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in pixels}  # type: ignore[misc]

    fills = {look(number, kind).fill for number in range(2) for kind in "FB"}  # type: ignore[arg-type]
    for bar in drawn.bars:
        left, top = position(page, drawn, bar.start, bar.top)
        right, bottom = position(page, drawn, bar.end, bar.bottom)
        found = colours(round(left) + 2, round(right) - 2, round(top) + 2, round(bottom) - 4)
        style = look(bar.op.pipeline, bar.op.kind)
        assert found & fills == {style.fill}, bar
        beside_label = colours(round(left) + 2, round(left) + 9, round(top) + 2, round(bottom) - 4)
        assert (beside_label != {style.fill}) == bool(style.hatch), "the second model is hatched"
    for rank, curve in enumerate(drawn.memory):
        of_rank = [bar for bar in drawn.bars if bar.rank == rank]
        for before, after in pairwise(of_rank):
            if after.start > before.end:
                left, top = position(page, drawn, before.end, before.top)
                right, bottom = position(page, drawn, after.start, before.bottom)
                assert not colours(round(left) + 2, round(right) - 2, round(top) + 2, round(bottom) - 5) & fills
        x, floor = position(page, drawn, drawn.makespan / 2, curve.floor)
        assert len(colours(round(x), round(x) + 1, round(floor) - 12, round(floor))) > 1, "memory is drawn"
    for bar in drawn.path:
        x, y = position(page, drawn, (bar.start + bar.end) / 2, bar.path_height)
        assert INK in colours(round(x), round(x) + 1, round(y) - 2, round(y) + 3)
    legend = page.locator(".legend .legendtext").all_text_contents()
    assert legend == [
        *("actor forward", "actor backward", "critic forward", "critic backward"),
        *("memory", "memory limit", "critical path"),
    ]


def test_a_crowded_page_shows_operations_where_it_is_zoomed(browser: Any, tmp_path: Path) -> None:
    """Sixty-four micro-batches on four ranks: slices of time from afar; what is switched off stays off."""
    problem = actor_and_critic(
        actor_stages=4,
        critic_stages=4,
        actor_microbatches=64,
        critic_microbatches=64,
        actor_forward=2,
        critic_forward=2,
    ).problem
    path = tmp_path / "schedule.html"
    path.write_text(html.page(html.figure(greedy(problem), overview=True)), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.barlayer .point path').length > 0")
    box = page.locator(".legend").bounding_box()
    assert box["y"] + box["height"] < 200, "the legend is above the fold"
    page.evaluate("plot = document.getElementById('schedule'), end = plot.layout.xaxis.range[1]")
    shown = "[...new Set(plot.data.filter(t => t.visible === true && t.meta).map(t => t.meta))].join()"
    assert page.evaluate(shown) == "overview"
    page.evaluate("Plotly.restyle(plot, {visible: 'legendonly'}, [0])")
    page.evaluate("Plotly.relayout(plot, {'xaxis.range': [end / 3, end / 2]})")
    page.wait_for_function(f"{shown} === 'operations'")
    assert page.evaluate("plot.data.find(t => t.meta === 'operations').visible") == "legendonly"
    page.evaluate("Plotly.relayout(plot, {'xaxis.range': [0, end]})")
    page.wait_for_function(f"{shown} === 'overview'")
    assert page.evaluate("plot.data[0].visible") == "legendonly"
    assert not complaints
    page.close()
