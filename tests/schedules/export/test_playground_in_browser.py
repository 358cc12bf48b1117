"""The page with sliders in a real browser: its evaluator and its greedy rule are those of Python, to the tick."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from schedules import Kind, Op, Problem, Schedule
from schedules.export import playground
from schedules.export.playground import QUARTERS, WHOLE, Form, codes, playground_problem
from schedules.fused.greedy import greedy
from schedules.timing import evaluate
from schedules.validate import check

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package: make setup")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

PATIENCE_MS = 120_000  # machines that run tests may be busy
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
SETTINGS: list[dict[str, int]] = [
    {"models": 2, "stages": 4, "microBatches": 8},
    {"models": 1, "stages": 6, "microBatches": 12, "actorForward": 3, "actorBackward": 5},
    {"models": 2, "stages": 8, "microBatches": 4, "criticForward": 7, "criticBackward": 9, "actorBackward": 2},
    {"models": 2, "stages": 4, "microBatches": 8, "limit": 9},
    {"models": 2, "stages": 4, "microBatches": 8, "limit": 5, "criticForward": 3, "actorMemory": 3, "criticMemory": 2},
    {"models": 2, "stages": 2, "microBatches": 16, "limit": 3, "actorForward": 1, "criticBackward": 16},
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page, which must not complain nor ask for anything."""
    path = tmp_path_factory.mktemp("page") / "playground.html"
    path.write_text(playground.page(time_limit_s=0.05, num_workers=1), encoding="utf-8")
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=PATIENCE_MS)
        opened = browser.new_page(viewport={"width": 1000, "height": 800})
        opened.set_default_timeout(PATIENCE_MS)
        opened.on("console", lambda message: complaints.append(message.text))
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("request", lambda asked: complaints.append(asked.url) if asked.url[:4] == "http" else None)
        opened.goto(path.as_uri())
        opened.wait_for_function("document.getElementById('table').children.length > 0")
        yield opened
        browser.close()
    assert not complaints


def problem_of(setting: Mapping[str, int], form: Form) -> Problem:
    """In quarters of a slider's ticks, and of its memory."""
    made = playground_problem(setting["models"], setting["stages"], setting["microBatches"], form)

    def changed(pipeline: Any) -> Any:
        def told(name: str, otherwise: tuple[int, ...], divided_by: int = 1) -> tuple[int, ...]:
            value = setting.get(f"{pipeline.name}{name}")
            return otherwise if value is None else (QUARTERS * value // form.laps // divided_by,) * len(otherwise)

        gradient = told("Backward", pipeline.input_grad_ticks, 2) if form.halves else None
        return replace(
            pipeline,
            forward_ticks=told("Forward", pipeline.forward_ticks),
            backward_ticks=told("Backward", pipeline.backward_ticks),
            activation_bytes=told("Memory", pipeline.activation_bytes),
            input_grad_ticks=gradient,
            weight_grad_ticks=gradient,
            weight_grad_bytes=told("Memory", pipeline.weight_grad_bytes) if form.halves else (),
        )

    limit = (QUARTERS * setting["limit"],) * made.num_ranks if "limit" in setting else None
    return replace(made, pipelines=tuple(map(changed, made.pipelines)), memory_limit_bytes=limit)


def of_page(rows: list[list[list[Any]]]) -> tuple[tuple[Op, ...], ...]:
    return tuple(tuple(Op(p, s, m, Kind[kind]) for p, s, m, kind in row) for row in rows)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting.values())))
def test_the_page_times_and_plans_as_python_does(shown: Any, setting: dict[str, int]) -> None:
    told = shown.evaluate(
        """setting => Object.entries(schedules({...settings, ...setting})).map(([name, one]) => [name, one.orders,
        evaluate(one.problem, one.orders)])""",
        setting,
    )
    forms = dict.fromkeys((name for name, _, _ in told), WHOLE)
    forms |= {name: form for name, (_, form) in playground._BASELINES.items() if name in forms}
    forms |= {name: form for name, form in playground._SOLVED.items() if name in forms}
    is_grouped = setting["microBatches"] % setting["stages"] == 0
    assert {*playground._BASELINES} - forms.keys() == ({"Interleaved 1F1B"} if not is_grouped else set())
    assert (playground._SOLVED.keys() <= forms.keys()) == (setting["models"] == 2)
    assert of_page(next(orders for name, orders, _ in told if name == "greedy")) == (
        greedy(problem_of(setting, WHOLE)).ranks
    )
    for name, orders, timing in told:
        problem = problem_of(setting, forms[name])
        schedule = Schedule(problem, of_page(orders))
        if name == "greedy" or problem.memory_limit_bytes is None:
            check(schedule)
        expected = evaluate(schedule)
        assert QUARTERS * timing["makespan"] == expected.makespan, name
        assert [QUARTERS * peak for peak in timing["peak"]] == list(expected.peak_bytes), name
        assert timing["idle"] == pytest.approx(expected.bubble_ratio), name
        assert [QUARTERS * start for row in timing["times"] for start, _ in row] == [
            start for row in expected.start for start in row
        ]


def test_what_does_not_fit_is_said(shown: Any) -> None:
    shown.evaluate("document.getElementById('limit').value = 1; document.getElementById('limit').oninput()")
    assert "No schedule fits into this memory." in shown.locator("#difference").text_content()
    assert shown.locator("#table tr", has_text="over the limit").count() >= 2
    shown.locator("#limit").focus()
    shown.keyboard.press("Home")
    assert "fits" not in shown.locator("#difference").text_content()
    assert shown.locator("#first-words").text_content() == "96 ticks, 25.0 % idle, peak memory 8"


def test_two_schedules_are_compared(shown: Any) -> None:
    shown.locator("#second").select_option("greedy")
    words = shown.locator("#difference").text_content()
    assert words.startswith("greedy takes ")
    assert "less than 1F1B" in words
    shown.set_viewport_size({"width": 360, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_codes_tell_pipeline_stage_kind_and_micro_batch() -> None:
    schedule = greedy(playground_problem(2, 2, 4))
    for row, order in zip(codes(schedule), schedule.ranks, strict=True):
        assert [(code >> 14, code >> 10 & 15, "FBIW"[code >> 8 & 3], code & 255) for code in row] == [
            (op.pipeline, op.stage, op.kind.name, op.micro_batch) for op in order
        ]
