"""The chart shows what runs when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules import Kind, Op, Pipeline, Problem, Schedule
from schedules.baselines import one_f_one_b
from schedules.export.terminal import gantt

PIPELINE = Pipeline(name="actor", ranks=(0, 1), num_micro_batches=2, forward_ticks=(1, 1), backward_ticks=(2, 2))


def test_one_column_per_tick_of_a_short_schedule() -> None:
    chart = gantt(one_f_one_b(Problem(num_ranks=2, pipelines=(PIPELINE,))))
    assert chart.splitlines()[:2] == ["   0 AA..aa.aa  66.7%", "   1 .AaaAaa..  66.7%"]
    assert "A actor" in chart
    assert "~" not in chart


def test_a_long_schedule_is_squeezed() -> None:
    slow = replace(PIPELINE, forward_ticks=(100, 100), backward_ticks=(200, 200))
    chart = gantt(one_f_one_b(Problem(num_ranks=2, pipelines=(slow,))), width=9)
    assert chart.splitlines()[0] == "   0 AA..aa.aa  66.7%"


def test_weight_gradients_have_a_sign_of_their_own() -> None:
    split = replace(PIPELINE, ranks=(0, 0), num_micro_batches=1, input_grad_ticks=(1, 1), weight_grad_ticks=(1, 1))
    order = [Op(0, 0, 0, Kind.F), Op(0, 1, 0, Kind.F), Op(0, 1, 0, Kind.I), Op(0, 0, 0, Kind.B), Op(0, 1, 0, Kind.W)]
    chart = gantt(Schedule(Problem(num_ranks=1, pipelines=(split,)), (tuple(order),)))
    assert chart.splitlines()[0] == "   0 AAaaa~ 100.0%"


def test_more_pipelines_than_letters_are_refused() -> None:
    pipelines = tuple(replace(PIPELINE, name=f"p{number}") for number in range(27))
    with pytest.raises(ValueError, match="27 pipelines; the chart has letters for 26"):
        gantt(Schedule(Problem(num_ranks=2, pipelines=pipelines), ((), ())))
