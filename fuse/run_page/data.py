"""What pages of a run show, as JSON: figures of all updates, and the details of those whose traces are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuse.idle_causes import CAUSES, idle_causes, shares
from fuse.interstage.recorded import Recorded, recorded_rollout, simulated
from fuse.interstage.rollout import SimulationResult, SpanKind
from fuse.metric_table import entry_of
from fuse.run_page.words import advice, alarms
from fuse.trace import PhaseClock
from fuse.trace_file import DRIVER, lanes_of, tracks_of
from fuse.update_log import BUSY_LETTERS, IDLE_LETTERS, NAME, NUM_CELLS, UpdateRecord, read, record_of
from schedules.export.palette import look
from schedules.export.text import drawable
from schedules.ir import Kind
from schedules.reading import finite_number, read_json
from schedules.recorded import RecordedStep, is_trace, recorded_steps

MOST_DETAILS = 12
"""Updates whose traces a page carries, evenly chosen; more would make it slow to open."""
_MOST_BYTES = 100_000_000
"""Of traces that a page is made of."""
_FIGURES = 5
_TRACE_NAME = re.compile(r"iteration-([0-9]+)\.json")


def run_data(records: Sequence[UpdateRecord], title: str, detailed: Iterable[int]) -> dict[str, Any]:
    """The figures of a run. detailed: updates of which there are details."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    devices = list(dict.fromkeys(device for record in records for device in record.strips))
    return {
        "title": drawable(title),
        "updates": [record.update for record in records],
        "start": [round(record.start_s - records[0].start_s, 4) for record in records],
        "end": [round(record.end_s - records[0].start_s, 4) for record in records],
        "began_s": records[0].start_s,
        "metrics": {name: [_figure(record.metrics.get(name)) for record in records] for name in names},
        "words": {name: _words(name) for name in names},
        "phases": [[[name, round(a, 4), round(b, 4)] for name, a, b in record.phases] for record in records],
        "devices": devices,
        "strips": [[record.strips.get(device, "") for device in devices] for record in records],
        "cells": NUM_CELLS,
        "busy": {letter: category for category, letter in BUSY_LETTERS.items()},
        "idle": {letter: [cause, CAUSES[cause]] for cause, letter in IDLE_LETTERS.items()},
        "looks": [{str(kind): look(number, kind).fill for kind in Kind} for number in range(6)],
        "advice": advice(records),
        "alarms": alarms(records),
        "detailed": sorted(detailed),
    }


def read_run(directory: Path) -> tuple[list[UpdateRecord], dict[int, Path]]:
    """The records of an output directory, and the traces of some of their updates.

    Raises:
        ValueError: there are none.
    """
    path = directory / NAME
    if not path.exists():
        raise ValueError(f"{directory} has no {NAME}: give the output directory of a run of fuse train, or a trace")
    records = read(path)
    if not records:
        raise ValueError(f"{path} holds no update yet: wait for the first one to end")
    return records, _chosen_traces(directory, {record.update for record in records})


def traces_of(directory: Path) -> dict[int, Path]:
    """Those that are kept, by update."""
    found = {}
    for path in sorted((directory / "traces").glob("iteration-*.json")):
        if match := _TRACE_NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return found


def _chosen_traces(directory: Path, updates: set[int]) -> dict[int, Path]:
    """Evenly, the last one always, of those that are there."""
    found = {number: path for number, path in traces_of(directory).items() if number in updates}
    numbers = sorted(found)
    if not numbers:
        return {}
    size = max(1, *(path.stat().st_size for path in found.values()))
    count = max(1, min(MOST_DETAILS, len(numbers), _MOST_BYTES // size))
    last = len(numbers) - 1
    kept = {numbers[last - index * last // max(1, count - 1)] for index in range(count)}
    return {number: found[number] for number in sorted(kept)}


def read_details(path: Path) -> dict[str, Any]:
    """Raises: ValueError for a file that is no trace, or a damaged one."""
    value = read_json(path, "a trace of a run")
    if not isinstance(value, dict) or not is_trace(value):
        raise ValueError(f"{path} is no trace of a run: give one of traces/iteration-*.json")
    return details(value)


def trace_record(trace: Mapping[str, object]) -> UpdateRecord:
    """The record of the one update that a trace holds, with what its spans tell alone."""
    tracks = tracks_of(trace)
    phases = [span for spans in tracks.pop(DRIVER, {}).values() for span in spans if span.category == "phase"]
    spans = [*phases, *(span for workers in tracks.values() for each in workers.values() for span in each)]
    if not tracks:
        raise ValueError("the trace holds no span of a device: give one of traces/iteration-*.json")
    clock = PhaseClock()
    clock.start_s, clock.end_s = min(span.start_s for span in spans), max(span.end_s for span in spans)
    clock.spans = phases
    total_s = clock.end_s - clock.start_s
    causes = shares(idle_causes(tracks, clock.start_s, clock.end_s, phases), total_s)
    about = trace.get("otherData")
    update = int(finite_number(about, "update", 1e15) or 0) if isinstance(about, Mapping) else 0
    metrics = {"time/total": total_s, **{f"idle_cause/{cause}": share for cause, share in causes.items()}}
    return record_of(update, metrics, tracks, clock)


def details(trace: Mapping[str, object]) -> dict[str, Any]:
    """A trace's rollout, as it was and as it is simulated, and every optimizer step, planned and executed.

    What cannot be drawn of it has its reason under `notes`.
    """
    made: dict[str, Any] = {"notes": [], "rollout": None, "simulated": None, "steps": [], "rewards": _rewards(trace)}
    recorded = recorded_rollout(trace)
    if recorded is not None:
        made["devices"] = list(recorded.devices)
        made["rollout"] = _rollout(recorded.result, recorded)
        made["policy"] = recorded.policy
        result = simulated(recorded)
        if result is None:
            made["notes"].append("Too little was measured in this update to simulate its rollout.")
        else:
            made["simulated"] = _rollout(result, recorded)
    else:
        made["notes"].append("This trace holds no samples: it was written by an earlier version.")
    try:
        made["steps"] = [_step(step) for step in recorded_steps(trace)]
    except ValueError as error:
        made["notes"].append(f"Its training cannot be drawn: {error}.")
    return made


def _rollout(result: SimulationResult, recorded: Recorded) -> dict[str, Any]:
    """Bars (device, lane, start, end, sample, tokens, prompt tokens, whether it moved), and blocks of inference."""
    counts: dict[int, int] = {}
    for span in result.samples:
        counts[span.sample] = counts.get(span.sample, 0) + 1
    bars: list[list[float | None]] = []
    num_lanes = 1
    for device in range(len(result.timeline)):
        spans = [span for span in result.samples if span.device == device]
        lanes = lanes_of([(span.start_s, span.end_s) for span in spans])
        num_lanes = max(num_lanes, *(lane + 1 for lane in lanes), 1)
        bars += [
            [
                *(device, lane, _figure(span.start_s), _figure(span.end_s), span.sample),
                *(recorded.tokens[span.sample], recorded.prompt_tokens[span.sample], int(counts[span.sample] > 1)),
            ]
            for span, lane in zip(spans, lanes, strict=True)
        ]
    return {
        "bars": bars,
        "lanes": num_lanes,
        "infer": [
            [device, _figure(span.start_s), _figure(span.end_s)]
            for device, spans in enumerate(result.timeline)
            for span in spans
            if span.kind is SpanKind.INFER
        ],
        "makespan": _figure(result.makespan_s),
        "generation": _figure(result.generation_s),
        "idle": _figure(result.idle_share),
        "migrations": result.num_migrations,
    }


def _step(step: RecordedStep) -> dict[str, Any]:
    """Operations (rank, kind, pipeline, stage, micro-batch, start, end, planned start and end), in seconds."""
    ops: list[list[Any]] = []
    for rank, order in enumerate(step.schedule.ranks):
        for index, op in enumerate(order):
            planned = [] if step.planned is None else [step.planned.start[rank][index], step.planned.end[rank][index]]
            times = [step.executed.start[rank][index], step.executed.end[rank][index], *planned]
            ops.append([rank, str(op.kind), op.pipeline, op.stage, op.micro_batch, *(_figure(t * 1e-6) for t in times)])
    return {
        "ranks": len(step.schedule.ranks),
        "pipelines": [pipeline.name for pipeline in step.schedule.problem.pipelines],
        "ops": ops,
        "executed": [_figure(step.executed.makespan * 1e-6), _figure(step.executed.bubble_ratio)],
        "planned": None
        if step.planned is None
        else [_figure(step.planned.makespan * 1e-6), _figure(step.planned.bubble_ratio)],
    }


def _rewards(trace: Mapping[str, object]) -> list[list[Any]]:
    """Calls of reward functions: (start, end, samples), in seconds of the trace's clock."""
    events = trace.get("traceEvents")
    calls = []
    for event in events if isinstance(events, list) else []:
        if isinstance(event, Mapping) and event.get("ph") == "X" and event.get("cat") == "reward":
            begin, length = finite_number(event, "ts", 1e15) or 0.0, finite_number(event, "dur", 1e15) or 0.0
            arguments = event.get("args")
            ids = arguments.get("sample_ids", []) if isinstance(arguments, Mapping) else []
            calls.append(
                [_figure(begin * 1e-6), _figure((begin + length) * 1e-6), len(ids) if isinstance(ids, list) else 0]
            )
    return calls


def _figure(value: float | None) -> float | None:
    """To as many figures as one sees; what is no number is none."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.{_FIGURES}g}")


def _words(name: str) -> list[str]:
    entry = entry_of(name)
    return ["", "", ""] if entry is None else [entry.unit, entry.meaning, entry.healthy]
