"""What a run recorded of its training: the order that each rank ran, when it did, and when it was to.

A trace is Chrome trace-event JSON, a process per device. An operation of training is a complete event of category
`train` named as `F actor.0.3` (kind, pipeline.stage.micro_batch), with `planned_start_s` and `planned_end_s` among its
arguments where it was planned; events of category `optimizer` end a step.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from schedules.ir import Kind, Op, Pipeline, Problem, Schedule
from schedules.reading import finite_number
from schedules.timing import Timing, evaluate
from schedules.validate import check

_NAME_FORM = re.compile(r"([FBIW]) (.+)\.([0-9]{1,9})\.([0-9]{1,9})")
TICK_S = 1e-6
_MOST_MICROSECONDS = 1e15
_NO_SECONDS = ("sample", "phase")
"""Categories of what lasts while a device, or the driver, does other things."""


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One optimizer step. Times are in ticks of a microsecond, from the step's first operation.

    The problem's ticks are the planned ones, or those executed where nothing was planned; it has no memory figures.
    """

    schedule: Schedule
    executed: Timing
    planned: Timing | None


@dataclass(frozen=True, slots=True)
class _Event:
    """An operation as recorded, microseconds; `planned`: from the start of its step."""

    kind: Kind
    pipeline: str
    stage: int
    micro_batch: int
    start: float
    end: float
    planned: tuple[float, float] | None

    @property
    def key(self) -> tuple[str, int, int, Kind]:
        return self.pipeline, self.stage, self.micro_batch, self.kind

    @property
    def ticks(self) -> float:
        """As planned, or else as executed."""
        start, end = self.planned or (self.start, self.end)
        return end - start


def is_trace(value: object) -> bool:
    """Whether a JSON value is a Chrome trace, in the form of an object."""
    return isinstance(value, Mapping) and "traceEvents" in value


def recorded_steps(trace: object) -> list[RecordedStep]:
    """Every optimizer step of a trace, in order; none where nothing was trained.

    Devices that ran the same operations together (tensor parallelism) are one rank, seen through the first of them.

    Raises:
        ValueError: not a trace, devices disagree on the number of steps, or a step is not a whole schedule.
    """
    tracks = [steps for steps in map(_steps, _tracks(trace)) if steps]
    if len({len(steps) for steps in tracks}) > 1:
        counts = ", ".join(str(len(steps)) for steps in tracks)
        raise ValueError(f"trace: devices recorded different numbers of training steps ({counts}); was it cut off?")
    steps = []
    for number, ranks in enumerate(zip(*tracks, strict=True), start=1):
        try:
            steps.append(_recorded(_distinct(ranks)))
        except ValueError as error:
            raise ValueError(f"trace: step {number}: {error}") from None
    return steps


def busy_seconds(trace: object) -> dict[str, dict[str, float]]:
    """By device and category, the seconds that a trace's complete events add up to.

    Raises:
        ValueError: not a trace.
    """
    names: dict[int, str] = {}
    seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in _events(trace):
        arguments = event.get("args")
        if event.get("name") == "process_name" and isinstance(arguments, Mapping):
            names[int(_number(event, "pid"))] = str(arguments.get("name"))
        elif event.get("ph") == "X" and (category := str(event.get("cat", "other"))) not in _NO_SECONDS:
            seconds[int(_number(event, "pid"))][category] += TICK_S * _duration(event)
    return {names.get(device, f"process {device}"): dict(spent) for device, spent in sorted(seconds.items())}


def _events(trace: object) -> list[Mapping[str, object]]:
    events = trace.get("traceEvents") if isinstance(trace, Mapping) else None
    if not isinstance(events, list):
        raise ValueError("trace: expected an object with a list traceEvents")
    return [event for event in events if isinstance(event, Mapping)]


def _tracks(trace: object) -> list[list[Mapping[str, object]]]:
    """Complete events of training and optimizers, by device in order, by time."""
    by_device: defaultdict[int, list[Mapping[str, object]]] = defaultdict(list)
    for event in _events(trace):
        if event.get("ph") == "X" and event.get("cat") in ("train", "optimizer"):
            by_device[int(_number(event, "pid"))].append(event)
    return [sorted(events, key=lambda event: _number(event, "ts")) for _, events in sorted(by_device.items())]


def _steps(track: Sequence[Mapping[str, object]]) -> list[list[_Event]]:
    steps: list[list[_Event]] = [[]]
    for event in track:
        if event["cat"] == "train":
            steps[-1].append(_event(event))
        elif steps[-1]:
            steps.append([])
    return [step for step in steps if step]


def _event(event: Mapping[str, object]) -> _Event:
    match = _NAME_FORM.fullmatch(str(event.get("name")))
    if match is None:
        raise ValueError(f"trace: training operation {event.get('name')!r} is not named as F actor.0.3")
    kind, pipeline, stage, micro_batch = match.groups()
    start = _number(event, "ts")
    arguments = event.get("args")
    planned = None
    if isinstance(arguments, Mapping) and "planned_start_s" in arguments:
        most_s = TICK_S * _MOST_MICROSECONDS
        planned = (
            _number(arguments, "planned_start_s", most_s) / TICK_S,
            _number(arguments, "planned_end_s", most_s) / TICK_S,
        )
        if not 0 <= planned[0] <= planned[1]:
            raise ValueError(f"trace: {match[0]} is planned from {planned[0]:g} to {planned[1]:g} microseconds")
    end = start + _duration(event)
    return _Event(Kind(kind), pipeline, int(stage), int(micro_batch), start, end, planned)


def _duration(event: Mapping[str, object]) -> float:
    duration = _number(event, "dur")
    if duration < 0:
        raise ValueError(f"trace: an event's dur is {duration:g}: nothing takes less than no time")
    return duration


def _number(members: Mapping[str, object], name: str, most: float = _MOST_MICROSECONDS) -> float:
    value = finite_number(members, name, most)
    if value is None:
        raise ValueError(f"trace: an event's {name} is {members.get(name)!r}, not a number of at most {most:g}")
    return value


def _distinct(ranks: Sequence[list[_Event]]) -> list[list[_Event]]:
    return list({tuple(event.key for event in events): events for events in reversed(ranks)}.values())[::-1]


def _recorded(ranks: Sequence[list[_Event]]) -> RecordedStep:
    events = [event for of_rank in ranks for event in of_rank]
    names = sorted({event.pipeline for event in events})
    pipelines = tuple(_pipeline(name, ranks) for name in names)
    orders = tuple(
        tuple(Op(names.index(event.pipeline), event.stage, event.micro_batch, event.kind) for event in of_rank)
        for of_rank in ranks
    )
    schedule = Schedule(Problem(num_ranks=len(ranks), pipelines=pipelines), orders)
    check(schedule)
    begin = min(event.start for event in events)
    executed = _timing(schedule, [[(event.start - begin, event.end - begin) for event in of_rank] for of_rank in ranks])
    planned = [[event.planned for event in of_rank if event.planned is not None] for of_rank in ranks]
    is_planned = all(event.planned is not None for event in events)
    return RecordedStep(schedule, executed, _timing(schedule, planned) if is_planned else None)


def _pipeline(name: str, ranks: Sequence[list[_Event]]) -> Pipeline:
    """A pipeline from what was recorded of it; an operation's ticks are the mean over the micro-batches."""
    home: dict[int, int] = {}
    ticks: defaultdict[tuple[int, Kind], list[float]] = defaultdict(list)
    num_micro_batches = 0
    for rank, events in enumerate(ranks):
        for event in events:
            if event.pipeline == name:
                home.setdefault(event.stage, rank)
                ticks[event.stage, event.kind].append(event.ticks)
                num_micro_batches = max(num_micro_batches, event.micro_batch + 1)
    stages = range(max(home) + 1)
    absent = next((stage for stage in stages if stage not in home), None)
    if absent is not None:
        raise ValueError(f"no operation of stage {absent} of {name} was recorded")

    def mean(stage: int, kind: Kind, otherwise: float) -> int:
        return max(1, round(fmean(ticks[stage, kind]) if ticks[stage, kind] else otherwise))

    if all(kind is Kind.F for _, kind in ticks):
        return Pipeline(
            name=name,
            ranks=tuple(home[stage] for stage in stages),
            num_micro_batches=num_micro_batches,
            forward_ticks=tuple(mean(stage, Kind.F, 0) for stage in stages),
            backward_ticks=(),
        )
    is_split = any(kind is Kind.I for _, kind in ticks)
    whole = [mean(stage, Kind.B, 0) for stage in stages]
    input_grads = tuple(mean(stage, Kind.I, whole[stage] / 2) for stage in stages)
    weight_grads = tuple(mean(stage, Kind.W, whole[stage] / 2) for stage in stages)
    return Pipeline(
        name=name,
        ranks=tuple(home[stage] for stage in stages),
        num_micro_batches=num_micro_batches,
        forward_ticks=tuple(mean(stage, Kind.F, 0) for stage in stages),
        backward_ticks=tuple(mean(stage, Kind.B, input_grads[stage] + weight_grads[stage]) for stage in stages),
        input_grad_ticks=input_grads if is_split else None,
        weight_grad_ticks=weight_grads if is_split else None,
    )


def _timing(schedule: Schedule, times: Sequence[Sequence[tuple[float, float]]]) -> Timing:
    start = tuple(tuple(round(begin) for begin, _ in of_rank) for of_rank in times)
    end = tuple(tuple(round(finish) for _, finish in of_rank) for of_rank in times)
    return Timing(
        start=start,
        end=end,
        makespan=max(max(ends) for ends in end if ends),
        busy_ticks=tuple(sum(ends) - sum(starts) for starts, ends in zip(start, end, strict=True)),
        peak_bytes=evaluate(schedule).peak_bytes,
    )
