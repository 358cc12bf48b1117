"""For how long an iteration waits for each kind of work."""

from __future__ import annotations

import pytest

from fuse.benchmarks.iteration.exposed import exposed_s
from fuse.trace import Span


def test_work_behind_work_of_an_earlier_kind_is_hidden() -> None:
    tracks = {
        "device0": {"generation": [Span("decode", "generate", 0, 4)], "model": [Span("reference", "infer", 2, 3)]},
        "device1": {
            "model": [
                Span("critic", "infer", 3, 6),
                Span("actor F0", "train", 5, 8),
                Span("step", "optimizer", 8, 9),
                Span("export", "weights", 8.5, 9.5),
                Span("message", "message", 9, 10),
            ]
        },
    }
    # Inference shows in [4, 5] alone: before, something is generated, and then trained.
    expected = {"generation": 4, "training": 4, "inference": 1, "weights": 0.5}
    assert exposed_s(tracks, 0, 10) == pytest.approx(expected)
    assert exposed_s(tracks, 3, 5) == pytest.approx({"generation": 1, "training": 0, "inference": 1, "weights": 0})
