"""Turns without a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuse.benchmarks.iteration.rates import Scale
from fuse.benchmarks.iteration.turn import Response, Turn

ONE = Response((1, 2), (3, 4, 5))
SCALE = Scale(num_devices=2, epochs=3, training_flops=lambda responses: 500 * len(responses), product_flops_per_s=500.0)


def made_turn(seconds: float, responses: Sequence[Response], **options: Any) -> Turn:
    figures: dict[str, Any] = {
        "metrics": {"objective/entropy": 1.0, "objective/scores": 2.0},
        "phases": {"training": seconds},
        "idle_share": {"device0": 0.5},
        "outside_share": 0.1,
        "exposed_s": {"training": 3.0},
        "bubbles": {},
        "peak_bytes": {"driver": 7},
    }
    return Turn(seconds=seconds, responses=tuple(responses), **(figures | options))
