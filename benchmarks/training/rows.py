"""Rows of `fuse bench training`: serial and fused steps, and what explains the difference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from fuse.benchmarks.training.batches import Task
from fuse.benchmarks.training.comparison import compare
from fuse.benchmarks.training.worker import TimedStep
from fuse.intrastage.placement import ModelName
from fuse.intrastage.planned import PlannedTimes
from schedules import Schedule

_GAIN_WANTED = 0.9
_CAUSES = ("contention", "imbalance", "overhead", "transfer")


class Side(TypedDict):
    """Steps by one schedule: medians over the repeats.

    step_ms: all of it. executed_ms: from the first operation's start to the last one's end; setup_ms: before that;
    optimizer_ms: after it. planned_ms: of the operations. bubble_*: idle shares while operations are executed.
    slowdown: seconds of all operations over those planned. overhead_share: of the step, on neither operations, waiting
    nor the optimizer. transfer_share: waiting for messages already made. The rest: where `executed_ms - planned_ms`
    went, see `fuse.benchmarks.training.comparison.Comparison`.
    """

    step_ms: float
    setup_ms: float
    executed_ms: float
    optimizer_ms: float
    planned_ms: float
    bubble_planned: float
    bubble_executed: float
    slowdown: float
    overhead_share: float
    transfer_share: float
    contention_ms: float
    imbalance_ms: float
    overhead_ms: float
    transfer_ms: float


class Row(TypedDict):
    """One setting. A gain is a ratio less one; gain_share is the measured one over the predicted one.

    predicted_ratio: of the planned operations, with the optimizer's measured time added to both sides.
    why: empty where fused was faster and had 90 % of the predicted gain; else what kept it from its plan most.
    """

    setting: str
    actor_layers: int
    critic_layers: int
    lengths: str
    num_micro_batches: int
    micro_batch_tokens: list[int]
    serial_ms: float
    fused_ms: float
    ratio: float
    predicted_ratio: float
    gain_share: float
    bubble_serial: float
    bubble_fused: float
    bubble_planned: float
    overhead_share: float
    why: str
    serial: Side
    fused: Side


def side_of(schedule: Schedule, planned: PlannedTimes, ranks: Sequence[TimedStep]) -> Side:
    """One step, from what each rank recorded."""
    found = compare(schedule, planned, [rank.spans for rank in ranks])
    start_s, end_s = min(rank.start_s for rank in ranks), max(rank.end_s for rank in ranks)
    operations = [[span for span in rank.spans if span.category == "train"] for rank in ranks]
    setup_s = min(of_rank[0].start_s for of_rank in operations if of_rank) - start_s
    step_s = end_s - start_s
    return {
        "step_ms": 1e3 * step_s,
        "setup_ms": 1e3 * setup_s,
        "executed_ms": 1e3 * found.makespan_executed_s,
        "optimizer_ms": 1e3 * (step_s - setup_s - found.makespan_executed_s),
        "planned_ms": 1e3 * found.makespan_planned_s,
        "bubble_planned": found.bubble_planned,
        "bubble_executed": found.bubble_executed,
        "slowdown": found.slowdown,
        "overhead_share": (setup_s + found.overhead_share * found.makespan_executed_s) / step_s,
        "transfer_share": found.transfer_share,
        "contention_ms": 1e3 * found.contention_s,
        "imbalance_ms": 1e3 * found.imbalance_s,
        "overhead_ms": 1e3 * found.overhead_s,
        "transfer_ms": 1e3 * found.transfer_s,
    }


def medians(sides: Sequence[Side]) -> Side:
    """Of each figure by itself."""
    figures: Sequence[Any] = sides
    values: Any = {name: statistics.median(one[name] for one in figures) for name in sides[0]}
    middle: Side = values
    return middle


def row_of(
    sizes: str, layers: Mapping[ModelName, int], task: Task, tokens: list[int], serial: Side, fused: Side
) -> Row:
    """What a setting came to. layers: of each model. tokens: of each micro-batch, padding included."""
    optimizer_ms = statistics.mean((serial["optimizer_ms"], fused["optimizer_ms"]))
    ratio = serial["step_ms"] / fused["step_ms"]
    predicted = (serial["planned_ms"] + optimizer_ms) / (fused["planned_ms"] + optimizer_ms)
    gain_share = (ratio - 1) / (predicted - 1) if predicted != 1 else 1.0
    return {
        "setting": f"{sizes} {task.lengths} {len(task.micro_batches)}",
        "actor_layers": layers["actor"],
        "critic_layers": layers["critic"],
        "lengths": task.lengths,
        "num_micro_batches": len(task.micro_batches),
        "micro_batch_tokens": tokens,
        "serial_ms": serial["step_ms"],
        "fused_ms": fused["step_ms"],
        "ratio": ratio,
        "predicted_ratio": predicted,
        "gain_share": gain_share,
        "bubble_serial": serial["bubble_executed"],
        "bubble_fused": fused["bubble_executed"],
        "bubble_planned": fused["bubble_planned"],
        "overhead_share": fused["overhead_share"],
        "why": "" if ratio > 1 and gain_share >= _GAIN_WANTED else _why(serial, fused),
        "serial": serial,
        "fused": fused,
    }


def _why(serial: Side, fused: Side) -> str:
    """What fused steps lost most on, beyond what serial steps would lose in as much time."""
    of_serial: Mapping[str, Any] = serial
    of_fused: Mapping[str, Any] = fused
    scale = fused["planned_ms"] / serial["planned_ms"]
    lost_ms = {cause: of_fused[f"{cause}_ms"] - scale * of_serial[f"{cause}_ms"] for cause in (*_CAUSES, "setup")}
    cause = max(lost_ms, key=lambda one: lost_ms[one])
    return f"{cause}: {lost_ms[cause]:.1f} ms more than serial steps lose in as much time"
