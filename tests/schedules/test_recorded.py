"""What a run wrote is read back: order, plan and what was executed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from schedules import check, evaluate
from schedules.recorded import recorded_steps

TRACE = Path(__file__).parents[1] / "golden" / "traces" / "iteration-00002.json"


@pytest.fixture
def trace() -> dict[str, Any]:
    """Of a run on two devices: the actor in four stages, the critic in two; two optimizer steps."""
    value: dict[str, Any] = json.loads(TRACE.read_text())
    return value


def training(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event.get("cat") == "train"]


def test_steps_of_a_run(trace: dict[str, Any]) -> None:
    steps = recorded_steps(trace)
    assert len(steps) == 2
    for step in steps:
        actor, critic = step.schedule.problem.pipelines
        assert (actor.name, actor.ranks, actor.num_micro_batches) == ("actor", (0, 1, 0, 1), 4)
        assert (critic.name, critic.ranks, critic.num_micro_batches) == ("critic", (1, 0), 4)
        check(step.schedule)
    assert [len(order) for order in steps[0].schedule.ranks] == [24, 24]


def test_times_are_those_of_the_spans(trace: dict[str, Any]) -> None:
    step = recorded_steps(trace)[0]
    assert step.planned is not None
    events = sorted(training(trace), key=lambda event: float(event["ts"]))
    first_step = events[: sum(map(len, step.schedule.ranks))]
    begin = first_step[0]["ts"]
    assert step.executed.makespan == round(max(event["ts"] + event["dur"] for event in first_step) - begin)
    assert step.planned.makespan == round(1e6 * max(event["args"]["planned_end_s"] for event in first_step))
    assert sum(step.executed.busy_ticks) == pytest.approx(sum(event["dur"] for event in first_step), abs=len(events))
    # The problem's ticks are means of the plan, so its evaluation is near the plan.
    assert evaluate(step.schedule).makespan == pytest.approx(step.planned.makespan, rel=0.1)


def test_without_a_plan_there_are_only_executed_times(trace: dict[str, Any]) -> None:
    for event in training(trace):
        del event["args"]["planned_start_s"]
    step = recorded_steps(trace)[0]
    assert step.planned is None
    assert evaluate(step.schedule).makespan > 0


def test_devices_of_a_tensor_parallel_group_are_one_rank(trace: dict[str, Any]) -> None:
    doubled = copy.deepcopy(trace)
    for event in doubled["traceEvents"]:
        event["pid"] *= 2
    doubled["traceEvents"] += [{**event, "pid": event["pid"] + 1} for event in doubled["traceEvents"]]
    assert recorded_steps(doubled) == recorded_steps(trace)


def test_split_backwards(trace: dict[str, Any]) -> None:
    halves = []
    for event in training(trace):
        if event["name"].startswith("B critic.1"):
            half = event["dur"] / 2
            halves.append({**event, "name": "W" + event["name"][1:], "ts": event["ts"] + half, "dur": half})
            event.update(name="I" + event["name"][1:], dur=half)
    trace["traceEvents"] += halves
    problem = recorded_steps(trace)[0].schedule.problem
    assert [pipeline.can_split for pipeline in problem.pipelines] == [False, True]


def test_a_trace_without_training_has_no_steps(trace: dict[str, Any]) -> None:
    events = [event for event in trace["traceEvents"] if event.get("cat") != "train"]
    assert recorded_steps({"traceEvents": events}) == []


def test_what_is_no_whole_step_is_refused(trace: dict[str, Any]) -> None:
    events = trace["traceEvents"]
    last = training(trace)[-1]
    with pytest.raises(ValueError, match=r"step 2: illegal schedule: .* missing"):
        recorded_steps({"traceEvents": [event for event in events if event is not last]})
    named = {"ph": "X", "cat": "train", "name": "forward", "pid": 0, "ts": 0, "dur": 1}
    with pytest.raises(ValueError, match="'forward' is not named as F actor"):
        recorded_steps({"traceEvents": [named]})
    with pytest.raises(ValueError, match="an event's ts is None, not a number"):
        recorded_steps({"traceEvents": [{"ph": "X", "cat": "train", "pid": 0}]})
    with pytest.raises(ValueError, match="expected an object with a list traceEvents"):
        recorded_steps([])
    of_one = [event for event in events if event["pid"] == 0 or event.get("cat") != "optimizer"]
    with pytest.raises(ValueError, match=r"different numbers of training steps \(2, 1\)"):
        recorded_steps({"traceEvents": of_one})
