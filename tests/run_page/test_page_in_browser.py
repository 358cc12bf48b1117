"""The page of a run in a real browser: no errors, no requests, every part drawn, by mouse and by keyboard, also dark,
narrow, large and served.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from fuse.run_page.data import read_details, read_run, run_data
from fuse.run_page.page import page
from fuse.run_page.serve import server_of
from fuse.update_log import NAME, append

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package: make setup")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

PATIENCE_MS = 120_000  # machines that run tests may be busy
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
HOSTILE = "</script><img src=x onerror=alert(1)>"
READY = "document.getElementById('number').textContent"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=PATIENCE_MS)
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, address: str, *, local: bool = True, **options: Any) -> Iterator[Any]:
    """A page, which must not complain, nor ask for anything but itself."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    shown = context.new_page()
    shown.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("request", lambda asked: complaints.append(asked.url) if local and asked.url[:4] == "http" else None)
    shown.goto(address)
    shown.wait_for_function(READY)
    yield shown
    assert not complaints
    context.close()


@pytest.fixture(scope="module")
def address(run_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a page whose names are hostile."""
    records, traces = read_run(run_directory)
    records = [replace(one, metrics={**one.metrics, HOSTILE: 1.0}) for one in records]
    details = {update: read_details(path) for update, path in traces.items()}
    for one in details.values():
        one["devices"] = [HOSTILE, *one["devices"][1:]]
    path = tmp_path_factory.mktemp("page") / "run.html"
    path.write_text(page(run_data(records, HOSTILE, details), details), encoding="utf-8")
    return path.as_uri()


def colours(shown: Any, canvas: str) -> set[tuple[int, ...]]:
    """What a canvas shows, but for blends at edges."""
    picture = Image.open(io.BytesIO(shown.locator(f"#{canvas}").screenshot())).convert("RGB")
    return {colour for count, colour in picture.getcolors(1 << 20) or () if count > 20}  # type: ignore[misc]


def styles(shown: Any, *names: str) -> set[tuple[int, ...]]:
    """Colours by their names in the style."""
    told = [shown.evaluate(f"css('{name}')") for name in names]
    return {tuple(int(one[index : index + 2], 16) for index in (1, 3, 5)) for one in told}


def test_every_part_is_drawn_and_names_are_text(browser: Any, address: str) -> None:
    with opened(browser, address) as shown:
        assert shown.title() == HOSTILE
        assert shown.locator("h1").text_content() == HOSTILE
        assert shown.locator("img").count() == 0
        assert shown.locator(".curve").count() >= 12
        assert shown.locator("#advice li").count() >= 1
        assert shown.locator("#number").text_content() == "Update 8"
        assert colours(shown, "phases") >= styles(shown, "generate", "train", "weights")
        assert colours(shown, "devices") >= styles(shown, "generate", "train", "space")
        assert colours(shown, "rollout") >= styles(shown, "generate", "moved", "space")
        assert colours(shown, "simulated") >= styles(shown, "generate", "space")
        assert "idle; planned" in shown.locator("#step-words").text_content()
        assert shown.locator("#step option").all_text_contents() == ["step 1 of 2", "step 2 of 2"]
        assert shown.locator("#step-key .key").all_text_contents() == [
            *("actor forward", "actor backward", "critic forward", "critic backward"),
        ]
        shown.locator("#all summary").click()
        shown.wait_for_function("document.getElementById('rest').children.length > 0")
        assert HOSTILE in shown.locator("#rest b").all_text_contents()


def test_the_mouse_names_what_is_under_it_and_chooses_updates(browser: Any, address: str) -> None:
    with opened(browser, address) as shown:
        bar = shown.evaluate("(() => { const b = json('update-8').rollout.bars[0]; return [b[0], b[4], b[5]]; })()")
        shown.locator("#rollout").hover(position={"x": 80, "y": 4})
        text = shown.locator("#tip").text_content()
        assert text.startswith(f"sample {bar[1]} on {HOSTILE}")
        assert f"{bar[2]} tokens" in text
        shown.locator("#devices").hover(position={"x": 300, "y": 5})
        assert "device0, update " in shown.locator("#tip").text_content()
        shown.locator("#phases").click(position={"x": 10, "y": 100})
        shown.wait_for_function(f"{READY} === 'Update 1'")
        assert "has no trace of update 1. It has those of 7, 8." in shown.locator("#no-detail").text_content()
        assert not shown.locator("#detail").is_visible()


def test_the_keyboard_goes_through_updates_and_zooms(browser: Any, address: str) -> None:
    with opened(browser, address) as shown:
        for key, number in (("ArrowLeft", 7), ("Home", 1), ("ArrowRight", 2), ("End", 8)):
            shown.keyboard.press(key)
            shown.wait_for_function(f"{READY} === 'Update {number}'")
        width = "view[1] - view[0]"
        before = shown.evaluate(width)
        shown.keyboard.press("+")
        shown.wait_for_function(f"Math.abs({width} - {before / 2}) < 1e-6")
        shown.keyboard.press("0")
        shown.wait_for_function(f"Math.abs({width} - {before}) < 1e-6")
        stops = set()
        for _ in range(14):
            shown.keyboard.press("Tab")
            stops.add(shown.evaluate("document.activeElement.id"))
        assert {"phases", "in", "out", "fit", "devices", "before", "after", "rollout", "step", "steps"} <= stops


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1200, "dark")])
def test_narrow_windows_and_dark_ones(browser: Any, address: str, width: int, scheme: str) -> None:
    with opened(browser, address, viewport={"width": width, "height": 800}, color_scheme=scheme) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        paper = styles(shown, "paper").pop()
        assert (sum(paper) < 150) == (scheme == "dark")
        assert colours(shown, "rollout") >= styles(shown, "generate", "moved")


def test_a_large_run_opens_and_is_zoomed(browser: Any, run_directory: Path, tmp_path: Path) -> None:
    """64 devices and 1,000 updates: from afar shares, from near what each device did."""
    records, _ = read_run(run_directory)
    strips = [*records[-1].strips.values()]
    many = {f"device{index}": strips[index % 2] for index in range(64)}
    large = [
        replace(records[index % 8], update=index + 1, start_s=20.0 * index, end_s=20.0 * index + 19, strips=many)
        for index in range(1000)
    ]
    path = tmp_path / "large.html"
    path.write_text(page(run_data(large, "large", []), {}), encoding="utf-8")
    assert path.stat().st_size < 12_000_000
    with opened(browser, path.as_uri()) as shown:
        assert colours(shown, "devices") >= styles(shown, "generate", "train", "space")
        shown.keyboard.press("Home")
        shown.wait_for_function(f"{READY} === 'Update 1'")
        for _ in range(8):
            shown.keyboard.press("+")
        shown.wait_for_function("view[1] - view[0] < whole() / 200")
        shown.locator("#devices").hover(position={"x": 200, "y": 3})
        assert shown.locator("#tip").text_content().startswith("device0, update ")


def test_a_served_page_follows_the_run(browser: Any, run_directory: Path, tmp_path: Path) -> None:
    records, traces = read_run(run_directory)
    for one in records[:-1]:
        append(tmp_path / NAME, one)
    (tmp_path / "traces").mkdir()
    for path in traces.values():
        shutil.copy(path, tmp_path / "traces")
    with server_of(tmp_path, 0) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            with opened(browser, f"http://127.0.0.1:{server.server_port}/", local=False) as shown:
                shown.wait_for_function("!document.getElementById('detail').hidden")
                assert shown.locator("#number").text_content() == "Update 7"
                append(tmp_path / NAME, records[-1])
                shown.wait_for_function(f"{READY} === 'Update 8'")
                shown.wait_for_function("document.getElementById('live').textContent === 'live'")
                told = shown.evaluate("fetch('details/8.json').then(r => r.json())")
                assert told["rollout"]["bars"] == json.loads(json.dumps(read_details(traces[8])))["rollout"]["bars"]
        finally:
            server.shutdown()
            thread.join()
