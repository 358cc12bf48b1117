"""Spans: what every device did, and when."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_EPOCH_S = time.time() - time.monotonic()


def now_s() -> float:
    """Seconds since the epoch by the clock as it was when this process began: setting it later changes no duration."""
    return _EPOCH_S + time.monotonic()


class Clock(Protocol):
    """Marks moments on a device's time line, and tells them in seconds later, so that nobody waits in between."""

    def mark(self) -> Any:
        """The moment when the device has done what it was given so far; returns at once."""
        ...

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """When these moments were, in seconds of `now_s`; waits until they have passed."""
        ...


class HostClock:
    """Of a device that has done what it was given when the call returns."""

    def mark(self) -> float:
        return now_s()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return list(marks)


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


@dataclass(frozen=True, slots=True)
class _Marked:
    """A span whose times are marks of a clock."""

    name: str
    category: str
    ready: Any
    start: Any
    end: Any
    arguments: Mapping[str, object]


class SpanRecorder:
    """Collects the spans of one worker until they are drained. clock: of the device on which they happen."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or HostClock()
        self._spans: list[Span | _Marked] = []

    @contextmanager
    def span(self, name: str, category: str, **arguments: object) -> Iterator[None]:
        """Record the time that the device takes for what the body gives it, also when it raises."""
        start = self._clock.mark()
        try:
            yield
        finally:
            self._spans.append(_Marked(name, category, None, start, self._clock.mark(), arguments))

    def mark(self) -> Any:
        """This moment, for `record`."""
        return self._clock.mark()

    def record(
        self, name: str, category: str, *, ready: Any, start: Any, end: Any, arguments: Mapping[str, object]
    ) -> None:
        """Record a span by its marks. `wait_s` tells how much later it began than at `ready`, when it could have."""
        self._spans.append(_Marked(name, category, ready, start, end, arguments))

    def add(self, span: Span) -> None:
        self._spans.append(span)

    def drain(self) -> list[Span]:
        """Return the spans recorded so far and forget them; waits until the last has ended."""
        spans, self._spans = self._spans, []
        marked = [span for span in spans if isinstance(span, _Marked)]
        marks = [mark for span in marked for mark in (span.ready, span.start, span.end) if mark is not None]
        seconds = iter(self._clock.seconds(marks))
        return [_told(span, seconds) if isinstance(span, _Marked) else span for span in spans]


def _told(span: _Marked, seconds: Iterator[float]) -> Span:
    arguments = dict(span.arguments)
    ready_s = None if span.ready is None else next(seconds)
    start_s, end_s = next(seconds), next(seconds)
    if ready_s is not None:
        arguments["wait_s"] = start_s - ready_s
    return Span(span.name, span.category, start_s, end_s, arguments)


class PhaseClock:
    """Wall time of an iteration and of the named phases inside it, which `spans` has one by one."""

    def __init__(self) -> None:
        self.start_s = now_s()
        self.end_s = self.start_s
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start_s = now_s()
        try:
            yield
        finally:
            self.end_s = now_s()
            self.spans.append(Span(name, "phase", start_s, self.end_s))
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
