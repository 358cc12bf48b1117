"""The trace follows the format's rules, and says what the evaluator says."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from schedules import Schedule, evaluate
from schedules.export.chrome import trace_events
from schedules.random_problems import random_problem, random_schedule
from schedules.walk import needs

from ...examples import examples

Event = dict[str, Any]


def events_of(schedule: Schedule) -> list[Event]:
    """What a reader of the written file gets."""
    value = json.loads(json.dumps(trace_events(schedule)))
    events: list[Event] = value["traceEvents"]
    return events


def check_format(events: list[Event]) -> None:
    """What the Trace Event Format asks of complete, metadata, counter and flow events."""
    slices: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    threads = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    for event in events:
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert event["args"]
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] > 0
            assert (event["pid"], event["tid"]) in threads
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "C":
            assert all(isinstance(value, int | float) for value in event["args"].values())
        else:
            assert event["ph"] in "sf"
    for of_thread in slices.values():
        of_thread.sort()
        for (_, end), (start, _) in pairwise(of_thread):
            assert end <= start, "slices of a thread may nest, but these would overlap"
    ends: defaultdict[tuple[str, str, int], dict[str, Event]] = defaultdict(dict)
    for event in events:
        if event["ph"] in "sf":
            assert event["ph"] not in ends[event["cat"], event["name"], event["id"]], "an arrow has one start and end"
            ends[event["cat"], event["name"], event["id"]][event["ph"]] = event
    for arrow in ends.values():
        assert arrow["s"]["ts"] < arrow["f"]["ts"]
        assert arrow["f"]["bp"] == "e"
        for event in arrow.values():
            of_thread = slices[event["pid"], event["tid"]]
            assert sum(start < event["ts"] < end for start, end in of_thread) == 1, "it binds to the slice around it"


def test_follows_the_format(fused: Schedule, split: Schedule) -> None:
    check_format(events_of(fused))
    check_format(events_of(split))


@pytest.mark.parametrize("seed", range(examples(15)))
def test_follows_the_format_on_anything(seed: int) -> None:
    random = Random(seed)
    check_format(events_of(random_schedule(random_problem(random, max_forward_only=2), random)))


def test_operations_are_where_and_when_the_evaluator_has_them(fused: Schedule) -> None:
    timing = evaluate(fused)
    slices = [event for event in events_of(fused) if event["ph"] == "X"]
    assert len(slices) == sum(map(len, fused.ranks))
    first = slices[0]
    assert first["name"] == "F actor.0.0"
    assert first["cat"] == "actor,forward"
    assert (first["ts"], first["dur"]) == (0, 2000)
    assert max(event["ts"] + event["dur"] for event in slices) == 1000 * timing.makespan


def test_arrows_are_what_ranks_wait_for(fused: Schedule) -> None:
    ops = {op for _, op in fused.ops()}
    across = [
        (needed, op)
        for _, op in fused.ops()
        for needed in needs(ops, op, fused.problem)
        if fused.problem.rank_of(needed) != fused.problem.rank_of(op)
    ]
    events = events_of(fused)
    slices = [event for event in events if event["ph"] == "X"]

    def around(end: Event) -> str:
        """The operation that an arrow's end belongs to."""
        (name,) = (
            each["name"]
            for each in slices
            if each["tid"] == end["tid"] and each["ts"] < end["ts"] < each["ts"] + each["dur"]
        )
        return str(name)

    starts, ends = ({event["id"]: around(event) for event in events if event["ph"] == phase} for phase in "sf")
    names = ("actor", "critic")
    expected = {tuple(f"{op.kind} {names[op.pipeline]}.{op.stage}.{op.micro_batch}" for op in pair) for pair in across}
    assert {(starts[number], ends[number]) for number in starts} == expected
    assert len(starts) == 12  # 2 models, 3 micro-batches, there and back


def test_memory_counters_reach_the_peak(fused: Schedule) -> None:
    counters = [event for event in events_of(fused) if event["ph"] == "C"]
    for rank, peak in enumerate(evaluate(fused).peak_bytes):
        assert max(event["args"]["bytes"] for event in counters if event["name"] == f"memory of rank {rank}") == peak


def test_recorded_times_take_the_place_of_the_planned(fused: Schedule) -> None:
    timing = evaluate(fused)
    late = replace(timing, start=tuple(tuple(start + 5 for start in starts) for starts in timing.start))
    late = replace(late, end=tuple(tuple(end + 5 for end in ends) for ends in timing.end))
    events: Any = trace_events(fused, timing=late, microseconds_per_tick=1.0)["traceEvents"]
    assert min(event["ts"] for event in events if event["ph"] == "X") == 5
