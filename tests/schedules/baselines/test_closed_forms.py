"""Bubble and memory of GPipe and 1F1B equal their closed forms up to 8 stages x 32 micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import product

import pytest

from schedules import Pipeline, Problem, Schedule, evaluate, violations
from schedules.baselines import gpipe, one_f_one_b
from schedules.timing import Timing

SHAPES = list(product(range(1, 9), (*range(1, 11), 15, 16, 17, 32)))
Baseline = Callable[[Problem], Schedule]


def _equal_stages(num_stages: int, num_micro_batches: int) -> Problem:
    pipeline = Pipeline(
        name="model",
        ranks=tuple(range(num_stages)),
        num_micro_batches=num_micro_batches,
        forward_ticks=(3,) * num_stages,
        backward_ticks=(5,) * num_stages,
        activation_bytes=(7,) * num_stages,
    )
    return Problem(num_ranks=num_stages, pipelines=(pipeline,))


@cache
def _timing(baseline: Baseline, num_stages: int, num_micro_batches: int) -> Timing:
    schedule = baseline(_equal_stages(num_stages, num_micro_batches))
    assert violations(schedule) == []
    return evaluate(schedule)


@pytest.mark.parametrize("baseline", [gpipe, one_f_one_b])
def test_bubble_ratio(baseline: Baseline) -> None:
    for num_stages, num_micro_batches in SHAPES:
        timing = _timing(baseline, num_stages, num_micro_batches)
        assert timing.makespan == (num_micro_batches + num_stages - 1) * (3 + 5)
        for busy in timing.busy_ticks:
            idle = Fraction(timing.makespan - busy, timing.makespan)
            assert idle == Fraction(num_stages - 1, num_micro_batches + num_stages - 1)
        assert timing.bubble_ratio == pytest.approx((num_stages - 1) / (num_micro_batches + num_stages - 1))


def test_gpipe_holds_every_micro_batch() -> None:
    for num_stages, num_micro_batches in SHAPES:
        timing = _timing(gpipe, num_stages, num_micro_batches)
        assert timing.peak_bytes == (7 * num_micro_batches,) * num_stages


def test_one_f_one_b_holds_one_micro_batch_per_later_stage() -> None:
    for num_stages, num_micro_batches in SHAPES:
        timing = _timing(one_f_one_b, num_stages, num_micro_batches)
        assert timing.peak_bytes == tuple(7 * min(num_micro_batches, num_stages - s) for s in range(num_stages))


def test_one_f_one_b_written_out() -> None:
    schedule = one_f_one_b(_equal_stages(3, 4))
    assert [" ".join(f"{op.kind}{op.micro_batch}" for op in order) for order in schedule.ranks] == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


@pytest.mark.parametrize("baseline", [gpipe, one_f_one_b])
def test_other_placements_are_refused(baseline: Baseline) -> None:
    pipeline = _equal_stages(2, 2).pipelines[0]
    virtual = Pipeline(name="v", ranks=(0, 0), num_micro_batches=1, forward_ticks=(1, 1), backward_ticks=(1, 1))
    with pytest.raises(ValueError, match="rank 0 has 2 stages"):
        baseline(Problem(num_ranks=1, pipelines=(virtual,)))
    with pytest.raises(ValueError, match="use serial for several"):
        baseline(Problem(num_ranks=2, pipelines=(pipeline, virtual)))
