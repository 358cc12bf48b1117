"""Spans as a Chrome trace, which Perfetto and `fuse show` open.

A process per device, a thread per worker, an event per span. Samples overlap, so each takes the lowest lane that is
free while it is in the engine: a thread of its own per lane. An arrow follows a sample from engine to engine and to
what scores it; counters tell how many samples an engine decodes, with how much context, and the bytes of workers.

Source: Trace Event Format, complete ("X"), metadata ("M"), flow ("s", "t", "f") and counter ("C") events.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fuse.idle_causes import Tracks
from fuse.memory_use import USAGE
from fuse.trace import Span
from schedules.reading import finite_number

DRIVER = "driver"
"""The name of the driver among devices."""
SAMPLE = "sample"
"""The category of a sample's stay in an engine."""
FIRST_LANE = 100
"""Threads from this one on are lanes of samples."""
_MICROSECONDS = 1e6
_MOST = 1e15


def write_chrome_trace(path: Path, tracks: Tracks, about: Mapping[str, object] | None = None) -> None:
    """Write spans as JSON, making the directory.

    tracks: by device, or `DRIVER`, and worker. about: what readers need to know beside, as `otherData`. Times become
    microseconds since the earliest span.
    """
    origin_s = min(
        (span.start_s for workers in tracks.values() for spans in workers.values() for span in spans), default=0.0
    )
    events: list[dict[str, object]] = []
    flows: defaultdict[object, list[dict[str, object]]] = defaultdict(list)
    for process, (device, workers) in enumerate(tracks.items()):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": device}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}})
        for thread, (worker, spans) in enumerate(workers.items()):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": worker}})
            for tid, span in _placed(spans, thread):
                where = {"pid": process, "tid": tid, "ts": (span.start_s - origin_s) * _MICROSECONDS}
                if span.category == USAGE:
                    events.append({"ph": "C", "name": f"bytes of {worker}", **where, "args": dict(span.arguments)})
                    continue
                length = span.duration_s * _MICROSECONDS
                told = {"name": span.name, "cat": span.category, **where, "dur": length, "args": dict(span.arguments)}
                events.append({"ph": "X", **told})
                for sample in _samples_of(span):
                    flows[sample].append({**where, "ts": where["ts"] + length / 2})
            lanes = {tid for tid, _ in _placed(spans, thread) if tid >= FIRST_LANE}
            events += [
                {
                    "ph": "M",
                    "name": "thread_name",
                    "pid": process,
                    "tid": tid,
                    "args": {"name": f"sample lane {tid - FIRST_LANE}"},
                }
                for tid in sorted(lanes)
            ]
            events += _counters(spans, process, origin_s)
    events += _arrows(flows)
    path.parent.mkdir(parents=True, exist_ok=True)
    other = {} if about is None else {"otherData": dict(about)}
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms", **other}))


def lanes_of(stays: Sequence[tuple[float, float]]) -> list[int]:
    """The lowest lane that is free for each stay, (start, end) in any order."""
    lanes = [0] * len(stays)
    free: list[int] = []
    taken: list[tuple[float, int]] = []
    for index in sorted(range(len(stays)), key=lambda index: stays[index]):
        start, end = stays[index]
        while taken and taken[0][0] <= start:
            heapq.heappush(free, heapq.heappop(taken)[1])
        lane = heapq.heappop(free) if free else len(taken)
        heapq.heappush(taken, (end, lane))
        lanes[index] = lane
    return lanes


def _placed(spans: Sequence[Span], thread: int) -> Iterator[tuple[int, Span]]:
    """Every span and its thread."""
    stays = [span for span in spans if span.category == SAMPLE]
    lanes = iter(lanes_of([(span.start_s, span.end_s) for span in stays]))
    for span in spans:
        yield (FIRST_LANE + next(lanes) if span.category == SAMPLE else thread), span


def _samples_of(span: Span) -> Sequence[object]:
    """Whom an arrow goes through here: those in the engine, and those that are scored or rewarded."""
    if span.category == SAMPLE:
        return [span.arguments["sample"]]
    ids = span.arguments.get("sample_ids", ())
    return ids if isinstance(ids, list | tuple) else ()


def _counters(spans: Sequence[Span], process: int, origin_s: float) -> Iterator[dict[str, object]]:
    """An engine's live samples and their context, wherever these change."""
    before: dict[str, object] = {}
    for span in spans:
        if span.category != "generate":
            continue
        for name, label in (("batch", "live samples"), ("context_tokens", "KV tokens")):
            value = span.arguments.get(name)
            if value is not None and before.get(name) != value:
                before[name] = value
                moment = (span.start_s - origin_s) * _MICROSECONDS
                yield {"ph": "C", "name": label, "pid": process, "ts": moment, "args": {name: value}}


def _arrows(flows: Mapping[object, Sequence[Mapping[str, object]]]) -> Iterator[dict[str, object]]:
    for number, points in enumerate(flows.values()):
        ordered = sorted(points, key=lambda point: float(str(point["ts"])))
        for index, point in enumerate(ordered if len(ordered) > 1 else ()):
            phase = "s" if not index else "f" if index == len(ordered) - 1 else "t"
            ends = {"bp": "e"} if phase != "s" else {}
            yield {"ph": phase, "name": SAMPLE, "cat": SAMPLE, "id": number, **point, **ends}


def tracks_of(trace: Mapping[str, object]) -> dict[str, dict[str, list[Span]]]:
    """The spans of a trace that `write_chrome_trace` wrote, by device and worker; seconds since its first event.

    Raises:
        ValueError: an event is damaged.
    """
    events = trace.get("traceEvents")
    if not isinstance(events, list):
        raise ValueError("trace: expected an object with a list traceEvents")
    devices: dict[object, str] = {}
    workers: dict[tuple[object, object], str] = {}
    tracks: dict[str, dict[str, list[Span]]] = {}
    for event in events:
        arguments = event.get("args") if isinstance(event, Mapping) else None
        if not isinstance(arguments, Mapping):
            continue
        process, thread = _key(event, "pid"), _key(event, "tid")
        if event.get("name") == "process_name":
            devices[process] = str(arguments.get("name"))
        elif event.get("name") == "thread_name":
            workers[process, thread] = str(arguments.get("name"))
        elif event.get("ph") == "X":
            begin, length = finite_number(event, "ts", _MOST), finite_number(event, "dur", _MOST)
            if begin is None or length is None or length < 0:
                raise ValueError(f"trace: event {event.get('name')!r} has no time, or a negative one")
            device = devices.get(process, f"process {process:g}")
            worker = "generation" if thread >= FIRST_LANE else workers.get((process, thread), f"thread {thread:g}")
            times = begin / _MICROSECONDS, (begin + length) / _MICROSECONDS
            span = Span(str(event.get("name")), str(event.get("cat", "")), *times, dict(arguments))
            tracks.setdefault(device, {}).setdefault(worker, []).append(span)
    return tracks


def _key(event: Mapping[str, object], name: str) -> float:
    return finite_number(event, name, _MOST) or 0.0
