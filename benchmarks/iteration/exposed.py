"""Exposed times: for how long an iteration waits for work of each kind, after what is hidden behind other work."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fuse.benchmarks.measure import Tracks, spans_of
from fuse.trace import Span, busy_s

_CATEGORIES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "generation": frozenset({"generate"}),
        "training": frozenset({"train", "optimizer"}),
        "inference": frozenset({"infer", "logprobs"}),
        "weights": frozenset({"weights"}),
    }
)
"""Categories of spans by kind. A kind is hidden while any device does work of a kind before it."""


def exposed_s(tracks: Tracks, start_s: float, end_s: float) -> dict[str, float]:
    """Seconds by kind; what is left of the time is that in which no device did any of it."""
    spans = [span for workers in tracks.values() for span in spans_of(workers)]
    counted: list[Span] = []
    seconds, before_s = {}, 0.0
    for kind, categories in _CATEGORIES.items():
        counted += [span for span in spans if span.category in categories]
        reached_s = busy_s(counted, start_s, end_s)
        seconds[kind] = reached_s - before_s
        before_s = reached_s
    return seconds
