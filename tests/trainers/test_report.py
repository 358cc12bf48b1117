"""What an iteration's spans say: idle shares by hand-made spans, and bubbles of planned steps alone."""

from __future__ import annotations

import pytest

from fuse.trace import PhaseClock, Span
from fuse.trainers.report import iteration_report, summary_line


def op(name: str, start_s: float, end_s: float, planned: tuple[float, float] | None) -> Span:
    arguments = {} if planned is None else {"planned_start_s": planned[0], "planned_end_s": planned[1]}
    return Span(name, "train", start_s, end_s, arguments)


def clock(end_s: float) -> PhaseClock:
    made = PhaseClock()
    made.start_s, made.end_s, made.seconds = 0.0, end_s, {"training": end_s}
    return made


def step(at_s: float) -> Span:
    return Span("step actor", "optimizer", at_s, at_s)


def test_idle_is_what_no_worker_of_a_device_covers() -> None:
    tracks = {"device0": {"generation": [op("decode", 0, 4, None)], "model": [op("F", 3, 5, None)]}}
    report = iteration_report(tracks, clock(10.0))
    assert report.pop("idle_cause/driver") + report.pop("idle_cause/cool_down", 0.0) == pytest.approx(0.5)
    assert report == {"time/training": 10.0, "time/total": 10.0, "idle/device0": 0.5}
    assert summary_line(report) == "10.00 s (training 10.00), idle device0 50%"


def test_idle_shares_of_many_devices_are_summed_up() -> None:
    tracks = {f"device{n}": {"generation": [], "model": [op("F", 0, n, None)]} for n in range(9)}
    report = iteration_report(tracks, clock(10.0))
    idle = {name: share for name, share in report.items() if name.startswith("idle/")}
    assert idle == pytest.approx({"idle/min": 0.2, "idle/mean": 0.6, "idle/max": 1.0})
    del tracks["device8"]
    report = iteration_report(tracks, clock(10.0))
    assert [name for name in report if name.startswith("idle/")] == [f"idle/device{n}" for n in range(8)]


def test_bubbles_are_those_of_all_planned_steps() -> None:
    # Planned: 2 + 1 busy of 2 ranks x 2 s. Executed in the first step: 4 + 2 of 2 x 4; in the second 3 + 1 of 2 x 4.
    first = [op("F", 10, 14, (0.0, 2.0))], [op("F", 12, 14, (1.0, 2.0))]
    second = [op("F", 20, 23, (0.0, 2.0))], [op("F", 23, 24, (1.0, 2.0))]
    measured = op("profile", 1, 9, None)  # before the first step: that one is left out
    tracks = {
        f"device{rank}": {
            "generation": [],
            "model": [step(0), *first[rank], step(15), step(16), *second[rank], step(25), step(26)],
        }
        for rank in range(2)
    }
    report = iteration_report(tracks, clock(30.0), {"bubble/serial": 0.5})
    assert report["bubble/planned"] == pytest.approx(1 - 3 / 4)
    assert report["bubble/executed"] == pytest.approx(1 - 10 / 16)
    assert report["bubble/serial"] == 0.5
    assert summary_line(report).endswith("bubbles planned 25%, executed 38%, serial 50%")

    for device in tracks.values():
        device["model"].insert(1, measured)
    assert iteration_report(tracks, clock(30.0), {"bubble/serial": 0.5})["bubble/executed"] == pytest.approx(1 - 4 / 8)


def test_without_a_plan_there_are_no_bubbles_to_report() -> None:
    tracks = {"device0": {"generation": [], "model": [op("F", 0, 1, None), step(1)]}}
    assert "bubble/serial" not in iteration_report(tracks, clock(2.0), {"bubble/serial": 0.5})
