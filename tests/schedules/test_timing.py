"""Times, bubbles and memory of orders small enough to draw by hand, and properties of all orders."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules import Kind, Op, Pipeline, Problem, Schedule, evaluate
from schedules import timing as timing_module
from schedules.formats import schedule_from_text
from schedules.random_problems import random_problem, random_schedule


def _ops(text: str) -> tuple[Op, ...]:
    return tuple(map(Op.parse, text.split()))


TWO_STAGES = Problem(
    num_ranks=2,
    pipelines=(
        Pipeline(
            name="actor",
            ranks=(0, 1),
            num_micro_batches=2,
            forward_ticks=(2, 3),
            backward_ticks=(5, 4),
            input_grad_ticks=(2, 2),
            weight_grad_ticks=(3, 2),
            activation_bytes=(7, 10),
            weight_grad_bytes=(4, 6),
            transfer_ticks=1,
        ),
    ),
    initial_bytes=(100, 0),
)


def test_full_backwards_by_hand() -> None:
    # rank 0: F0 0-2, F1 2-4, then B0 after rank 1's B0 (3..6 F, 6..10 B) and a transfer: 11-16, B1 18-23.
    # rank 1: F0 3-6 (transfer after 2), B0 6-10, F1 10-13, B1 13-17.
    timing = evaluate(Schedule(TWO_STAGES, (_ops("F0.0.0 F0.0.1 B0.0.0 B0.0.1"), _ops("F0.1.0 B0.1.0 F0.1.1 B0.1.1"))))
    assert timing.start == ((0, 2, 11, 18), (3, 6, 10, 13))
    assert timing.end == ((2, 4, 16, 23), (6, 10, 13, 17))
    assert timing.makespan == 23
    assert timing.busy_ticks == (14, 14)
    assert timing.bubble_ratios == (9 / 23, 9 / 23)
    assert timing.bubble_ratio == 18 / 46
    assert timing.peak_bytes == (114, 10)


def test_split_backwards_by_hand() -> None:
    # rank 1: F0 3-6, I0 6-8, F1 8-11, I1 11-13, W0, W1 13-17; rank 0: I0 9-11 (8 + transfer), I1 14-16, W0, W1.
    # bytes on rank 1: 10, 6, 16, 12, 6, 0.
    timing = evaluate(
        Schedule(
            TWO_STAGES,
            (
                _ops("F0.0.0 F0.0.1 I0.0.0 I0.0.1 W0.0.0 W0.0.1"),
                _ops("F0.1.0 I0.1.0 F0.1.1 I0.1.1 W0.1.0 W0.1.1"),
            ),
        )
    )
    assert timing.start == ((0, 2, 9, 14, 16, 19), (3, 6, 8, 11, 13, 15))
    assert timing.makespan == 22
    assert timing.peak_bytes == (114, 16)


def test_a_neighbour_may_split_while_the_other_does_not() -> None:
    timing = evaluate(
        Schedule(
            TWO_STAGES,
            (_ops("F0.0.0 F0.0.1 B0.0.0 B0.0.1"), _ops("F0.1.0 I0.1.0 W0.1.0 F0.1.1 B0.1.1")),
        )
    )
    assert timing.start[0][2] == 9  # stage 0 needs only the input gradient, which ends at 8


def test_micro_batches_of_their_own_lengths_by_hand() -> None:
    # Micro-batch 1 takes twice as long. rank 0: F0 0-2, F1 2-6, B0 11-16, then B1 after rank 1's: 25-35.
    # rank 1: F0 3-6, B0 6-10, F1 10-16, B1 16-24; transfers still take 1.
    schedule = Schedule(TWO_STAGES, (_ops("F0.0.0 F0.0.1 B0.0.0 B0.0.1"), _ops("F0.1.0 B0.1.0 F0.1.1 B0.1.1")))
    timing = evaluate(schedule, lambda op: TWO_STAGES.ticks(op) * (1 + op.micro_batch))
    assert timing.start == ((0, 2, 11, 25), (3, 6, 10, 16))
    assert timing.makespan == 35
    assert timing.busy_ticks == (21, 21)
    assert timing.peak_bytes == evaluate(schedule).peak_bytes


def test_no_transfer_between_stages_of_one_rank() -> None:
    pipeline = replace(TWO_STAGES.pipelines[0], ranks=(0, 0), num_micro_batches=1, transfer_ticks=50)
    problem = Problem(num_ranks=1, pipelines=(pipeline,))
    assert evaluate(Schedule(problem, (_ops("F0.0.0 F0.1.0 B0.1.0 B0.0.0"),))).makespan == 2 + 3 + 4 + 5


def test_an_empty_schedule_takes_no_time() -> None:
    timing = evaluate(Schedule(TWO_STAGES, ((), ())))
    assert (timing.makespan, timing.bubble_ratio, timing.peak_bytes) == (0, 0.0, (100, 0))


@pytest.mark.parametrize(
    ("orders", "reason"),
    [
        (("B0.0.0 F0.0.0", "F0.1.0 B0.1.0"), "deadlocks: rank 0 at B0.0.0 waits for F0.0.0"),
        (("F0.0.0 B0.0.0 F0.0.1", "F0.1.0 F0.1.1 B0.1.0"), "rank 0 at B0.0.0 waits for B0.1.0"),
        (("F0.0.0 B0.0.0", "F0.1.0"), "rank 0: B0.0.0 needs B0.1.0, which is absent"),
        (("F0.0.9", ""), "F0.0.9 is not an operation of this problem"),
    ],
)
def test_what_has_no_times_is_refused(orders: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        evaluate(Schedule(TWO_STAGES, tuple(map(_ops, orders))))
    assert "\n" not in str(error.value)


@given(st.randoms(use_true_random=False))
def test_times_are_the_earliest_that_the_order_allows(random: Random) -> None:
    problem = random_problem(random, max_forward_only=2)
    schedule = random_schedule(problem, random)
    timing = evaluate(schedule)
    end = {op: timing.end[r][i] for r, order in enumerate(schedule.ranks) for i, op in enumerate(order)}
    for rank, order in enumerate(schedule.ranks):
        for index, op in enumerate(order):
            earliest = [timing.end[rank][index - 1] if index else 0]
            last = op.stage == problem.pipelines[op.pipeline].num_stages - 1
            sources = {
                Kind.F: [op._replace(stage=op.stage - 1)],
                Kind.B: [op._replace(kind=Kind.F)],
                Kind.I: [op._replace(kind=Kind.F)],
                Kind.W: [op._replace(kind=Kind.I)],
            }[op.kind]
            if op.kind in (Kind.B, Kind.I) and not last:
                sources += [Op(op.pipeline, op.stage + 1, op.micro_batch, kind) for kind in (Kind.B, Kind.I)]
            earliest += [end[s] + problem.transfer_ticks(s, op) for s in sources if s in end]
            assert timing.start[rank][index] == max(earliest)
            assert timing.end[rank][index] == max(earliest) + problem.ticks(op)
    assert timing.makespan == max(end.values())


def test_an_order_is_walked_once_for_all_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    num_walks = []
    walk = timing_module.walk
    monkeypatch.setattr(timing_module, "walk", lambda of: num_walks.append(1) or walk(of))
    problem = replace(TWO_STAGES, initial_bytes=(3, 4))  # that no other test has timed
    schedule = Schedule(problem, (_ops("F0.0.0 F0.0.1 B0.0.0 B0.0.1"), _ops("F0.1.0 B0.1.0 F0.1.1 B0.1.1")))
    once = evaluate(schedule)
    twice = evaluate(schedule, lambda op: 2 * problem.ticks(op), lambda *ops: 2 * problem.transfer_ticks(*ops))
    assert len(num_walks) == 1
    assert twice.start == tuple(tuple(2 * start for start in starts) for starts in once.start)
    reordered = Schedule(problem, (schedule.ranks[0], _ops("F0.1.0 F0.1.1 B0.1.0 B0.1.1")))
    assert evaluate(reordered).start != once.start
    assert len(num_walks) == 2


def test_renaming_ranks_renames_results() -> None:
    text = (
        "schedule 1\nnum_ranks 2\npipeline a\nranks {0} {1}\nnum_micro_batches 1\nforward_ticks 1 2\n"
        "backward_ticks 3 4\nrank 0: {2}\nrank 1: {3}\n"
    )
    first, second = "F0.0.0 B0.0.0", "F0.1.0 B0.1.0"
    forwards = evaluate(schedule_from_text(text.format(0, 1, first, second)))
    reversed_ = evaluate(schedule_from_text(text.format(1, 0, second, first)))
    assert reversed_.start == forwards.start[::-1]
    assert reversed_.makespan == forwards.makespan == 10
