"""Every idle second has one cause: by hand, on two devices, through generation, scoring, a step and weights."""

from __future__ import annotations

import pytest

from fuse.idle_causes import idle_causes, shares
from fuse.trace import Span


def op(name: str, start_s: float, end_s: float, planned: tuple[float, float] | None = None) -> Span:
    arguments = {} if planned is None else {"planned_start_s": planned[0], "planned_end_s": planned[1]}
    return Span(name, "train", start_s, end_s, arguments)


def span(category: str, start_s: float, end_s: float) -> Span:
    return Span(category, category, start_s, end_s)


def test_an_update() -> None:
    tracks = {
        "device0": {
            "generation": [span("generate", 1, 4), span("generate", 5, 10), span("sample", 1, 10)],
            "model": [
                span("infer", 10, 11),
                # The plan has it wait from 4 to 6 for the backward of the second stage.
                *(op("F a.0.0", 20, 24, (0, 4)), op("B a.0.0", 29, 33, (6, 10))),
                span("optimizer", 37, 38),
            ],
        },
        "device1": {
            "generation": [span("generate", 2, 6)],
            "model": [
                span("infer", 10, 13),
                *(op("F a.1.0", 25, 26, (4, 5)), op("B a.1.0", 26, 28, (5, 6)), op("F b.0.0", 30, 31, (9, 10))),
                span("optimizer", 35, 38),
            ],
        },
    }
    phases = [Span("weights", "phase", 38, 42), Span("reward", "phase", 14, 16)]
    causes = idle_causes(tracks, 0, 42, phases)
    ends = {"driver": 1 + 1 + 4, "reward": 2, "weights": 4}  # before the first token, around the rewards' phase
    assert causes["device0"] == pytest.approx(
        {**ends, "host": 1, "scoring": 2, "dependency": 2, "drift": 2, "message": 1, "optimizer": 4}
    )
    # It computed 4 seconds less than device0 in the step, whose other idle time is 5 + 2 (cool-down) seconds.
    rest = 1 - 4 / 7
    assert causes["device1"] == pytest.approx(
        {**ends, "start": 1, "tail": 4, "optimizer": 2, "imbalance": 4, "host": 2}
        | {"warm_up": 5 * rest, "cool_down": 2 * rest}
    )
    for device, of_device in causes.items():
        busy = {"device0": 3 + 5 + 1 + 8 + 1, "device1": 4 + 3 + 4 + 3}[device]
        assert sum(of_device.values()) == pytest.approx(42 - busy)
    assert shares(causes, 42)["weights"] == pytest.approx(4 / 42)


def test_a_gap_without_a_plan_is_a_dependency() -> None:
    tracks = {
        "device0": {"model": [op("F a.0.0", 0, 1), op("B a.0.0", 5, 6)]},
        "device1": {"model": [op("F a.1.0", 1, 2), op("B a.1.0", 2, 4)]},
    }
    causes = idle_causes(tracks, 0, 6)
    assert causes["device0"] == pytest.approx({"dependency": 3 * 3 / 4, "message": 1 * 3 / 4, "imbalance": 1})
    assert causes["device1"] == pytest.approx({"warm_up": 1, "cool_down": 2})
    assert shares({}, 1.0) == {}
