"""Rows of `fuse bench training`: serial and fused steps, and what explains the difference."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fuse.benchmarks.options import Row
from fuse.benchmarks.training.batches import Task
from fuse.benchmarks.training.comparison import compare
from fuse.benchmarks.training.worker import TimedRound
from fuse.intrastage.planned_times import PlannedTimes
from schedules import Schedule

_GAIN_WANTED = 0.9
_CAUSES = ("contention", "imbalance", "overhead", "transfer")


Side = dict[str, float]
"""Steps by one schedule."""


def side_of(schedule: Schedule, planned: PlannedTimes, ranks: Sequence[TimedRound]) -> Side:
    """One round of steps, from what each rank recorded.

    step_ms: all of it. executed_ms: from the first operation's start to the last one's end; setup_ms: before that;
    optimizer_ms: after it. planned_ms: of the operations. bubble_*: idle shares while operations are executed.
    slowdown: seconds of all operations over those planned. overhead_share: of the step, on neither operations, waiting
    nor the optimizer. transfer_share: waiting for messages already made. The rest: where `executed_ms - planned_ms`
    went, see `Comparison`.
    """
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
        **{name: getattr(found, name) for name in ("bubble_planned", "bubble_executed", "slowdown")},
        "overhead_share": (setup_s + found.overhead_share * found.makespan_executed_s) / step_s,
        "transfer_share": found.transfer_share,
        **{f"{cause}_ms": 1e3 * getattr(found, f"{cause}_s") for cause in _CAUSES},
    }


def together(rounds: Sequence[Side], timed: Sequence[TimedRound]) -> Side:
    """All rounds of a step as one. timed: what all ranks recorded of them.

    Milliseconds add up, but those of the whole, in which a rank may begin a round before others have ended the last;
    the rest are means over what they are shares of.
    """
    step_ms = 1e3 * (max(one.end_s for one in timed) - min(one.start_s for one in timed))
    weights = {"overhead_share": "step_ms", "bubble_planned": "planned_ms", "slowdown": "planned_ms"}
    total = {
        name: sum(one[name] for one in rounds)
        if name.endswith("_ms")
        else statistics.fmean([one[name] for one in rounds], [one[weights.get(name, "executed_ms")] for one in rounds])
        for name in rounds[0]
    }
    return total | {"step_ms": step_ms, "optimizer_ms": step_ms - total["setup_ms"] - total["executed_ms"]}


def medians(sides: Sequence[Side]) -> Side:
    """Of each figure by itself."""
    return {name: statistics.median(side[name] for side in sides) for name in sides[0]}


def row_of(
    sizes: str,
    layers: Mapping[str, int],
    task: Task,
    tokens: list[int],
    serial: Side,
    fused: Side,
    *,
    padding: float,
    critic_epochs: int = 1,
    num_trained: Mapping[str, int] | None = None,
) -> Row:
    """What a setting came to. layers: of each model. tokens: of each micro-batch, padding included.

    padding: computed tokens over real ones.
    critic_epochs: optimizer steps of the critic for one of the actor.
    num_trained: micro-batches of both sides, where these are not as many as were drawn.

    A gain is a ratio less one; gain_share: the measured one over the predicted one.
    predicted_ratio: of the planned operations, with what comes before and after them, as measured, added to both sides.
    why: empty where fused was faster and had 90 % of the predicted gain; else what kept it from its plan most.
    """
    around_ms = statistics.mean(one["setup_ms"] + one["optimizer_ms"] for one in (serial, fused))
    ratio = serial["step_ms"] / fused["step_ms"]
    predicted = (serial["planned_ms"] + around_ms) / (fused["planned_ms"] + around_ms)
    gain_share = (ratio - 1) / (predicted - 1) if predicted != 1 else 1.0
    return {
        "setting": f"{sizes} {task.lengths} {len(task.micro_batches)}" + (f" x{critic_epochs}" * (critic_epochs > 1)),
        "actor_layers": layers["actor"],
        "critic_layers": layers["critic"],
        "lengths": task.lengths,
        "num_micro_batches": len(task.micro_batches),
        "num_trained": num_trained or dict.fromkeys(("serial", "fused"), len(task.micro_batches)),
        "critic_epochs": critic_epochs,
        "micro_batch_tokens": tokens,
        "padding": padding,
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
    scale = fused["planned_ms"] / serial["planned_ms"]
    lost_ms = {cause: fused[f"{cause}_ms"] - scale * serial[f"{cause}_ms"] for cause in (*_CAUSES, "setup")}
    cause = max(lost_ms, key=lambda one: lost_ms[one])
    return f"{cause}: {lost_ms[cause]:.1f} ms more than serial steps lose in as much time"
