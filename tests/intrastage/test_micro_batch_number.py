"""The number of micro-batches, against closed forms of 1F1B: smaller bubbles for what operations cost at any size."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.micro_batch_number import ALIKE, TIMES, Work, median_gap_s, soonest
from fuse.intrastage.placement import Replica, replicas_of
from fuse.intrastage.training_schedule import serial_schedule
from fuse.trace import Span
from schedules import Schedule

NUM_STAGES, DRAWN, TOKENS = 4, 4, 960
PIPELINE = (Replica("actor", 0, tuple(range(NUM_STAGES))),)
SIZES = [round(TOKENS / times) for times in TIMES]
TICK_S = 1e-5


def profile(fixed_ticks: int, placement: Sequence[Replica] = PIPELINE) -> Profile:
    """A forward takes a tick per token beside what is fixed, a backward twice as long."""
    return Profile(
        tick_s=TICK_S,
        stages=tuple(
            StageCosts(
                pipeline=replica.name,
                stage=stage,
                shape=Shape(1, size),
                forward_ticks=fixed_ticks + size,
                backward_ticks=2 * (fixed_ticks + size),
                input_grad_ticks=None,
                weight_grad_ticks=None,
                activation_bytes=0,
                weight_grad_bytes=0,
            )
            for replica in placement
            for stage in range(len(replica.ranks))
            for size in SIZES
        ),
        transfers=(),
    )


def works(times: float) -> list[Work]:
    """Two rounds of as many tokens, without padding."""
    return [Work({"actor": (Shape(1, round(TOKENS / times)),) * round(DRAWN * times)})] * 2


def serial(work: Work) -> Schedule:
    return serial_schedule(replicas_of(PIPELINE, work.counts), work.counts)


def closed_form_s(times: float, fixed_ticks: int, gap_s: float) -> float:
    """Of 1F1B in equal stages: as if all forwards and backwards of N + S - 1 micro-batches ran one after the other."""
    forward_s = TICK_S * (fixed_ticks + round(TOKENS / times))
    return 2 * (round(DRAWN * times) + NUM_STAGES - 1) * (3 * forward_s + 2 * gap_s)


@pytest.mark.parametrize(
    ("fixed_ticks", "gap_s", "expected"),
    [(0, 0.0, 8.0), (200, 0.0, 2.0), (700, 0.0, 1.0), (0, 3e-3, 2.0), (0, 1.05e-2, 1.0)],
)
def test_the_number_is_the_greatest_that_is_over_about_soonest(fixed_ticks: int, gap_s: float, expected: float) -> None:
    found = soonest(works, profile(fixed_ticks), PIPELINE, serial, least_tokens=1, gap_s=gap_s)
    in_theory = {times: closed_form_s(times, fixed_ticks, gap_s) for times in TIMES}
    least_s = min(in_theory.values())
    assert found == expected == max(times for times in TIMES if in_theory[times] <= (1 + ALIKE) * least_s)


@pytest.mark.parametrize(("fixed_ticks", "expected"), [(1, 8.0), (100, 1.0)])
def test_where_nothing_is_gained_the_smaller_ones_are_taken_that_cost_about_as_much(
    fixed_ticks: int, expected: float, caplog: pytest.LogCaptureFixture
) -> None:
    """One device has no bubbles: 8 times as many of 120 tokens cost 8 times what is fixed, and hold an eighth."""
    alone = (Replica("actor", 0, (0,)),)

    def schedule(work: Work) -> Schedule:
        return serial_schedule(alone, work.counts)

    with caplog.at_level("INFO"):
        found = soonest(works, profile(fixed_ticks, alone), alone, schedule, least_tokens=1, gap_s=0.0)
    costs = {times: times * fixed_ticks + TOKENS for times in TIMES}
    assert found == expected == max(times for times in TIMES if costs[times] <= (1 + ALIKE) * costs[1.0])
    if found == 1.0:
        assert "4 micro-batches of actor, as they were drawn: more are planned to take over 3% longer" in caplog.text


def test_what_micro_batches_cost_that_are_smaller_than_any_observed_is_not_guessed() -> None:
    found = soonest(works, profile(0), PIPELINE, serial, least_tokens=SIZES[TIMES.index(2.0)], gap_s=0.0)
    assert found == 2.0


def test_one_device_has_no_bubbles_but_padding() -> None:
    """Twice the micro-batches have a third less of it here."""
    alone = (Replica("actor", 0, (0,)),)

    def padded(times: float) -> list[Work]:
        return [Work({"actor": (Shape(1, 960 if times == 1 else 320),) * (4 if times == 1 else 8)})]

    def schedule(work: Work) -> Schedule:
        return serial_schedule(alone, work.counts)

    assert soonest(padded, profile(0, alone), alone, schedule, least_tokens=1, gap_s=0.0) == 1.5


def test_replicas_share_the_micro_batches() -> None:
    """Of two replicas one has 2 of 3 micro-batches; of 4 both have 2, and the step is over sooner. More cost more."""
    replicas = (Replica("actor", 0, (0,)), Replica("actor", 1, (1,)))

    def three(times: float) -> list[Work]:
        number = round(3 * times)
        return [Work({"actor": (Shape(1, 2880 // number),) * number})]

    def schedule(work: Work) -> Schedule:
        return serial_schedule(replicas, work.counts)

    assert soonest(three, profile(60, replicas), replicas, schedule, least_tokens=1, gap_s=0.0) == 1.5


def test_gaps_are_of_one_rank_and_without_its_waiting() -> None:
    def span(start_s: float, wait_s: float, category: str = "train") -> Span:
        return Span("F actor.0.0", category, start_s, start_s + 1.0, {"wait_s": wait_s})

    first_rank = [span(0.0, 0.0), span(3.0, 1.5), span(4.25, 0.0), span(9.0, 0.0, "optimizer"), span(20.0, 0.0)]
    second_rank = [span(0.5, 0.5), span(1.75, 0.0)]
    assert median_gap_s([*first_rank, *second_rank]) == pytest.approx(0.25)  # of 0.5, 0.25 and 0.25
    assert median_gap_s(first_rank[:1]) == 0.0
