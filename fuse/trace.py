"""Spans: what every device did, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

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


_NOTHING: Mapping[str, object] = {}


class Span(NamedTuple):
    """One operation on one device; times are of `now_s`, so they compare across processes of a host.

    A tuple, for hundreds of thousands may come from workers after an update.
    """

    name: str
    category: str
    start_s: float
    end_s: float
    arguments: Mapping[str, object] = _NOTHING

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
    """Wall time of an iteration and of the named phases inside it, which `spans` has one by one.

    rewards: calls of reward functions, for whoever makes them to tell.
    """

    def __init__(self) -> None:
        self.start_s = now_s()
        self.end_s = self.start_s
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self.rewards: list[Span] = []

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
