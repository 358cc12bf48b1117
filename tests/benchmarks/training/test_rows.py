"""Rows of the training benchmark: gains against predicted gains, and the cause that is named for a missing one."""

from __future__ import annotations

from typing import Any

import pytest

from fuse.benchmarks.training.batches import Task
from fuse.benchmarks.training.rows import Side, row_of, side_of, together
from fuse.benchmarks.training.worker import TimedRound
from fuse.intrastage.planned_times import times_of
from fuse.trace import Span
from schedules import Pipeline, Problem
from schedules.baselines import one_f_one_b

LAYERS = {"actor": 4, "critic": 2}
SIDE: Side = {
    "step_ms": 160.0,
    "setup_ms": 2.0,
    "executed_ms": 148.0,
    "optimizer_ms": 10.0,
    "planned_ms": 148.0,
    "bubble_planned": 0.3,
    "bubble_executed": 0.3,
    "slowdown": 1.0,
    "overhead_share": 0.01,
    "transfer_share": 0.0,
    "contention_ms": 0.0,
    "imbalance_ms": 0.0,
    "overhead_ms": 0.0,
    "transfer_ms": 0.0,
}
FUSED: Side = {**SIDE, "planned_ms": 105.0, "executed_ms": 105.0, "step_ms": 117.0, "bubble_planned": 0.02}


def row(serial: Side, fused: Side) -> dict[str, Any]:
    task = Task(lengths="uniform", micro_batches=((0, 1), (2, 3)))
    return row_of("2:1", LAYERS, task, [16, 16], serial, fused, padding=1.0)


def test_the_predicted_gain_includes_setup_and_optimizer_on_both_sides() -> None:
    found = row(SIDE, {**FUSED, "step_ms": 118.0, "setup_ms": 3.0})
    assert found["setting"] == "2:1 uniform 2"
    assert found["ratio"] == pytest.approx(160 / 118)
    assert found["predicted_ratio"] == pytest.approx((148 + 12.5) / (105 + 12.5))
    assert found["gain_share"] == pytest.approx((42 / 118) / (43 / 117.5))
    assert found["why"] == ""


def test_rounds_add_up_and_overlap() -> None:
    """One rank begins the second round while the other ends the first."""
    second: Side = {**FUSED, "setup_ms": 1.0, "overhead_share": 0.03}
    times = ((1.0, 1.16), (1.0, 1.15), (1.16, 1.27), (1.15, 1.26))
    found = together([SIDE, second], [TimedRound(start_s, end_s, []) for start_s, end_s in times])
    assert found["step_ms"] == pytest.approx(270)
    assert (found["setup_ms"], found["executed_ms"], found["planned_ms"]) == (3.0, 253.0, 253.0)
    assert found["optimizer_ms"] == pytest.approx(270 - 3 - 253)
    assert found["bubble_planned"] == pytest.approx((148 * 0.3 + 105 * 0.02) / 253)
    assert found["overhead_share"] == pytest.approx((160 * 0.01 + 117 * 0.03) / 277)
    assert found.keys() == SIDE.keys()


@pytest.mark.parametrize("cause", ["contention", "imbalance", "overhead", "transfer"])
def test_a_gain_that_is_missing_is_explained_by_what_was_lost_most(cause: str) -> None:
    slow: Side = {**FUSED, "step_ms": 141.0, "executed_ms": 129.0}
    slow[f"{cause}_ms"] = 24.0
    found = row(SIDE, slow)
    assert found["gain_share"] < 0.5
    assert found["why"] == f"{cause}: 24.0 ms more than serial steps lose in as much time"


def test_what_serial_steps_lose_as_well_explains_nothing() -> None:
    serial: Side = {**SIDE, "contention_ms": 74.0, "executed_ms": 222.0, "step_ms": 234.0}
    fused: Side = {**FUSED, "contention_ms": 52.5, "transfer_ms": 30.0, "executed_ms": 187.5, "step_ms": 199.5}
    assert row(serial, fused)["why"].startswith("transfer: 30.0 ms")


def test_a_step_is_cut_into_setup_operations_and_optimizer() -> None:
    pipeline = Pipeline(name="a", ranks=(0, 1), num_micro_batches=1, forward_ticks=(1, 1), backward_ticks=(2, 2))
    schedule = one_f_one_b(Problem(num_ranks=2, pipelines=(pipeline,)))
    planned = times_of(schedule, {op: 0.010 * schedule.problem.ticks(op) for _, op in schedule.ops()}, (0.0,))
    at_s = ((1.000, 1.010, 1.040, 1.060), (1.010, 1.020, 1.020, 1.040))
    ranks = []
    for rank, (forward_s, forward_end_s, backward_s, backward_end_s) in enumerate(at_s):
        spans = [
            Span(f"F a.{rank}.0", "train", forward_s, forward_end_s, {"wait_s": 0.0}),
            Span(f"B a.{rank}.0", "train", backward_s, backward_end_s, {"wait_s": 0.029 * (1 - rank)}),
            Span("step a", "optimizer", backward_end_s, 1.070),
        ]
        ranks.append(TimedRound(0.995, 1.070 + 0.001 * rank, spans))
    found = side_of(schedule, planned, ranks)
    assert found["step_ms"] == pytest.approx(76)
    assert found["setup_ms"] == pytest.approx(5)
    assert found["executed_ms"] == pytest.approx(60)
    assert found["optimizer_ms"] == pytest.approx(11)
    # 5 ms before the first operation, and on one of two ranks 1 ms between operations.
    assert found["overhead_share"] == pytest.approx((5 + 0.5) / 76)
