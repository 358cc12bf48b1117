"""Why devices were idle: every idle second of an update has one cause, told from the spans of all devices.

Between operations of training, a rank first waits for what it needs to be made, then for the message that brings it.
Of the first, what the plan had is a dependency, and the rest is drift. Ranks that had less to do than the busiest one
would idle in any schedule: that part of a step's idle time is imbalance, and the other causes share the rest.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from types import MappingProxyType

from fuse.trace import Span

CAUSES: Mapping[str, str] = MappingProxyType(
    {
        "start": "others generate already, this device has not begun",
        "host": "between two decode steps, or two operations that needed nothing from elsewhere: the host's time",
        "tail": "this device has generated all that it had, others still generate",
        "scoring": "all is generated, others still score",
        "reward": "waiting for reward functions",
        "warm_up": "before the first operation of an optimizer step",
        "cool_down": "after the last operation of an optimizer step",
        "dependency": "between operations of a step, as planned: what comes next was not made yet",
        "drift": "the same beyond the plan: operations took longer than planned",
        "message": "what comes next was made, and was on its way",
        "imbalance": "less to do in a step than the busiest device",
        "optimizer": "gradients are added up, optimizers of others step",
        "weights": "weights are on their way to engines and scoring copies",
        "driver": "none of these: the driver prepares, plans or waits",
    }
)
"""By name, what it means."""

Tracks = Mapping[str, Mapping[str, Sequence[Span]]]
"""Spans by device and worker."""
NOT_BUSY = frozenset({"sample", "usage"})
"""Categories of spans that tell of a device without its having computed for so long."""
_NAME = re.compile(r"([FBIW]) (.+)\.([0-9]+)\.([0-9]+)")

_Gap = tuple[float, float]
_Window = tuple[float, float, str]


def training_steps(track: Sequence[Span]) -> list[list[Span]]:
    """A device's training operations, step by step: the optimizers end each."""
    steps: list[list[Span]] = [[]]
    before = ""
    for span in track:
        category = span.category
        if category == "train":
            steps[-1].append(span)
        elif category == "optimizer" != before:
            steps.append([])
        before = category
    return steps


def idle_causes(
    tracks: Tracks, start_s: float, end_s: float, phases: Sequence[Span] = ()
) -> dict[str, dict[str, float]]:
    """By device and cause, the seconds of [start_s, end_s] in which no worker of it computed.

    phases: of the driver, as `PhaseClock.spans` has them.
    """
    steps = _steps(tracks)
    behind = _imbalances(steps)
    causes = {}
    for device, intervals in _idle_intervals(tracks, steps, start_s, end_s, phases).items():
        seconds: defaultdict[str, float] = defaultdict(float)
        for begin, end, cause in intervals:
            seconds[cause] += end - begin
        causes[device] = dict(seconds)
        _tell_imbalance(causes[device], behind[device])
    return causes


def idle_intervals(
    tracks: Tracks, start_s: float, end_s: float, phases: Sequence[Span] = ()
) -> dict[str, list[tuple[float, float, str]]]:
    """By device, when it was idle and why: (start, end, cause), of all causes but imbalance, which has no place."""
    return _idle_intervals(tracks, _steps(tracks), start_s, end_s, phases)


def _steps(tracks: Tracks) -> dict[str, list[list[Span]]]:
    return {device: training_steps(track) for device, track in _models(tracks).items()}


def _idle_intervals(
    tracks: Tracks, steps: Mapping[str, list[list[Span]]], start_s: float, end_s: float, phases: Sequence[Span]
) -> dict[str, list[tuple[float, float, str]]]:
    training = _training_windows(_models(tracks), steps)
    generating = {device: _reach(_of(workers, "generate")) for device, workers in tracks.items()}
    first_s = min((reach[0] for reach in generating.values() if reach), default=start_s)
    last_s = max((reach[1] for reach in generating.values() if reach), default=first_s)
    scored_s = max((span.end_s for workers in tracks.values() for span in _of(workers, "infer")), default=last_s)
    of_phases = {name: [one for one in phases if one.name == name] for name in ("weights", "reward")}
    found: dict[str, list[_Window]] = {}
    for device, workers in tracks.items():
        own = generating[device] or (first_s, first_s)
        windows = [
            training[device],
            _windows(of_phases["weights"], "weights"),
            [(*own, "host")],
            [(first_s, own[0], "start"), (own[1], last_s, "tail")],
            [(last_s, scored_s, "scoring")],
            _windows(of_phases["reward"], "reward"),
            [(start_s, end_s, "driver")],
        ]
        found[device] = []
        gaps = list(_gaps([span for spans in workers.values() for span in spans], start_s, end_s))
        for one in windows:
            gaps = _take(gaps, one, found[device])
        found[device].sort()
    return found


def _models(tracks: Tracks) -> dict[str, list[Span]]:
    """What the model workers did, in order."""
    return {
        device: sorted(workers.get("model", ()), key=lambda span: span.start_s) for device, workers in tracks.items()
    }


def shares(causes: Mapping[str, Mapping[str, float]], total_s: float) -> dict[str, float]:
    """By cause, the part of all devices' time; causes that took none are left out."""
    if not causes or total_s <= 0:
        return {}
    sums = {cause: sum(of_one.get(cause, 0.0) for of_one in causes.values()) for cause in CAUSES}
    return {cause: seconds / total_s / len(causes) for cause, seconds in sums.items() if seconds > 0}


def _of(workers: Mapping[str, Sequence[Span]], category: str) -> list[Span]:
    return [span for spans in workers.values() for span in spans if span.category == category]


def _reach(spans: Sequence[Span]) -> _Gap | None:
    return (min(span.start_s for span in spans), max(span.end_s for span in spans)) if spans else None


def _windows(spans: Sequence[Span], cause: str) -> list[_Window]:
    return [(span.start_s, span.end_s, cause) for span in spans]


def _gaps(spans: Sequence[Span], start_s: float, end_s: float) -> Iterator[_Gap]:
    """Where no span is, in order."""
    reached = start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.category in NOT_BUSY or span.end_s <= reached:
            continue
        if span.start_s >= end_s:
            break
        if span.start_s > reached:
            yield reached, span.start_s
        reached = span.end_s
    if reached < end_s:
        yield reached, end_s


def _take(gaps: list[_Gap], windows: Sequence[_Window], found: list[_Window]) -> list[_Gap]:
    """Add what lies within the windows, which are in order and disjoint, to what is found; returns what is left."""
    if not windows:
        return gaps
    begins = bisect_right(gaps, windows[0][0], key=itemgetter(1))
    ends = max(begins, bisect_left(gaps, windows[-1][1], key=itemgetter(0)))
    left = gaps[:begins]
    first, num_windows = 0, len(windows)
    for begin, end in gaps[begins:ends]:
        while first < num_windows and windows[first][1] <= begin:
            first += 1
        reached = begin
        for index in range(first, num_windows):
            window_begin, window_end, cause = windows[index]
            if window_begin >= end:
                break
            low, high = max(reached, window_begin), min(end, window_end)
            if high > low:
                if low > reached:
                    left.append((reached, low))
                found.append((low, high, cause))
                reached = high
        if reached < end:
            left.append((reached, end))
    return left + gaps[ends:]


def _training_windows(
    tracks: Mapping[str, Sequence[Span]], steps: Mapping[str, list[list[Span]]]
) -> dict[str, list[_Window]]:
    """Of each device, the causes of what is idle while optimizer steps are taken, and after each until all have."""
    windows: dict[str, list[_Window]] = {device: [] for device in tracks}
    stepped = sorted(span.end_s for track in tracks.values() for span in track if span.category == "optimizer")
    reaches = [_reach([span for of_rank in step for span in of_rank]) for step in zip(*steps.values(), strict=False)]
    for number, (step, reach) in enumerate(zip(zip(*steps.values(), strict=False), reaches, strict=True)):
        if reach is None:
            continue
        made = {span.name: span.end_s for spans in step for span in spans}
        for device, of_rank in zip(tracks, step, strict=True):
            windows[device] += _step_windows(of_rank, *reach, made)
        next_s = next((later[0] for later in reaches[number + 1 :] if later), float("inf"))
        done_s = max((moment for moment in stepped if reach[1] < moment <= next_s), default=reach[1])
        for of_device in windows.values():
            of_device.append((reach[1], done_s, "optimizer"))
    return windows


def _step_windows(spans: Sequence[Span], begin: float, end: float, made: Mapping[str, float]) -> list[_Window]:
    """made: when each operation of the step ended."""
    if not spans:
        return [(begin, end, "warm_up")]
    windows = [(begin, spans[0].start_s, "warm_up")]
    for before, span in pairwise(spans):
        if before.end_s < span.start_s:
            windows += _wait_windows(before, span, made)
    return [*windows, (max(span.end_s for span in spans), end, "cool_down")]


def _wait_windows(before: Span, span: Span, made: Mapping[str, float]) -> list[_Window]:
    """Why an operation began no earlier than it did, after the one before it on its rank."""
    free, start = before.end_s, span.start_s
    made_s = next((made[name] for name in _makers(span.name) if name in made), None)
    if made_s is None:
        return [(free, start, "host")]
    ready = min(start, max(free, made_s))
    planned_s = _planned_gap_s(before, span)
    planned_end = ready if planned_s is None else min(ready, free + planned_s)
    windows = (free, planned_end, "dependency"), (planned_end, ready, "drift"), (ready, start, "message")
    return [one for one in windows if one[0] < one[1]]


@lru_cache(maxsize=1 << 16)
def _makers(name: str) -> tuple[str, ...]:
    """Of a neighbouring stage, those of which one makes what this needs. Every step has operations of these names."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] == "W":
        return ()
    kind, pipeline, stage, micro_batch = match.groups()
    if kind == "F":
        return (f"F {pipeline}.{int(stage) - 1}.{micro_batch}",)
    return tuple(f"{one} {pipeline}.{int(stage) + 1}.{micro_batch}" for one in "BI")


def _planned_gap_s(before: Span, span: Span) -> float | None:
    end, start = before.arguments.get("planned_end_s"), span.arguments.get("planned_start_s")
    return max(0.0, start - end) if isinstance(end, float | int) and isinstance(start, float | int) else None


def _imbalances(steps: Mapping[str, list[list[Span]]]) -> dict[str, float]:
    """How many seconds less each device computed in the steps than the busiest one of each."""
    behind = dict.fromkeys(steps, 0.0)
    for step in zip(*steps.values(), strict=False):
        busy = [sum(span.duration_s for span in spans) for spans in step]
        for device, own in zip(behind, busy, strict=True):
            behind[device] += max(busy) - own
    return behind


_IN_STEPS = ("warm_up", "cool_down", "dependency", "drift", "message")


def _tell_imbalance(seconds: dict[str, float], imbalance_s: float) -> None:
    """Take imbalance out of what was idle in steps, from every cause alike."""
    idle_s = sum(seconds.get(cause, 0.0) for cause in _IN_STEPS)
    taken_s = min(imbalance_s, idle_s)
    if taken_s <= 0:
        return
    for cause in _IN_STEPS:
        if cause in seconds:
            seconds[cause] *= 1 - taken_s / idle_s
    seconds["imbalance"] = taken_s
