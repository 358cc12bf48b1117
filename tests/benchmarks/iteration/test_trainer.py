"""Where the time of this project's trainer goes."""

from __future__ import annotations

import pytest

from fuse.benchmarks.iteration.trainer import outside_share
from fuse.benchmarks.measure import idle_shares
from fuse.trace import Span


def test_time_outside_is_where_nobody_computes() -> None:
    tracks = {
        "device0": {"generation": [Span("decode", "generate", 0, 4)], "model": [Span("export", "weights", 4, 6)]},
        "device1": {"generation": [], "model": [Span("reference", "infer", 3, 5), Span("step", "optimizer", 7, 8)]},
    }
    # Somebody computes in [0, 5] and [7, 8] of the 10 seconds; device 0 is at work in [0, 6], device 1 for 3 seconds.
    assert outside_share(tracks, 0, 10) == pytest.approx(0.4)
    assert idle_shares(tracks, 0, 10) == pytest.approx({"device0": 0.4, "device1": 0.7})
