"""Spans: what every device did, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_EPOCH_S = time.time() - time.monotonic()


def now_s() -> float:
    """Seconds since the epoch by the clock as it was when this process began: setting it later changes no duration."""
    return _EPOCH_S + time.monotonic()


@dataclass(frozen=True, slots=True)
class Span:
    """One operation on one device; times are of `now_s`, so they compare across processes of a host."""

    name: str
    category: str
    start_s: float
    end_s: float
    arguments: Mapping[str, object] = field(default_factory=dict)

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class SpanRecorder:
    """Collects the spans of one worker until they are drained."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @contextmanager
    def span(self, name: str, category: str, **arguments: object) -> Iterator[None]:
        """Record the body's wall time, also when it raises."""
        start_s = now_s()
        try:
            yield
        finally:
            self._spans.append(Span(name, category, start_s, now_s(), arguments))

    def add(self, span: Span) -> None:
        self._spans.append(span)

    def drain(self) -> list[Span]:
        """Return the spans recorded so far and forget them."""
        spans, self._spans = self._spans, []
        return spans


class PhaseClock:
    """Wall time of an iteration and of the named phases inside it."""

    def __init__(self) -> None:
        self.start_s = now_s()
        self.end_s = self.start_s
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start_s = now_s()
        try:
            yield
        finally:
            self.end_s = now_s()
            self.seconds[name] = self.seconds.get(name, 0.0) + self.end_s - start_s


def busy_s(spans: Sequence[Span], start_s: float, end_s: float) -> float:
    """Seconds of [start_s, end_s] covered by at least one span: overlapping spans count once."""
    covered, reached = 0.0, start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        begin, end = max(span.start_s, reached), min(span.end_s, end_s)
        if end > begin:
            covered += end - begin
            reached = end
    return covered


def write_chrome_trace(path: Path, tracks: Mapping[str, Mapping[str, Sequence[Span]]]) -> None:
    """Write spans as Chrome trace-event JSON (opens in Perfetto), making the directory.

    `tracks` maps a device's name to its worker tracks, each a list of spans. Times become microseconds
    since the earliest span. Source: the Trace Event Format's complete ("X") and metadata ("M") events.
    """
    origin_s = min(
        (span.start_s for workers in tracks.values() for spans in workers.values() for span in spans), default=0.0
    )
    events: list[dict[str, object]] = []
    for process, (device, workers) in enumerate(tracks.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": device}})
        for thread, (worker, spans) in enumerate(workers.items()):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": worker}})
            events.extend(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": span.category,
                    "pid": process,
                    "tid": thread,
                    "ts": (span.start_s - origin_s) * 1e6,
                    "dur": span.duration_s * 1e6,
                    "args": dict(span.arguments),
                }
                for span in spans
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
