"""Baselines with virtual stages, split backwards or two directions: their closed forms, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from schedules import Pipeline, Problem, Schedule, evaluate, violations
from schedules.baselines import chimera, interleaved, one_f_one_b, serial, zero_bubble_h1, zero_bubble_v


def _problem(
    ranks: tuple[int, ...], num_micro_batches: int, f: int, b: int, halves: tuple[int, int] | None = None
) -> Problem:
    stages = len(ranks)
    pipeline = Pipeline(
        name="model",
        ranks=ranks,
        num_micro_batches=num_micro_batches,
        forward_ticks=(f,) * stages,
        backward_ticks=(b,) * stages,
        input_grad_ticks=(halves[0],) * stages if halves else None,
        weight_grad_ticks=(halves[1],) * stages if halves else None,
        activation_bytes=(1,) * stages,
        weight_grad_bytes=(1,) * stages if halves else (),
    )
    return Problem(num_ranks=max(ranks) + 1, pipelines=(pipeline,))


@pytest.mark.parametrize("num_ranks", range(1, 7))
@pytest.mark.parametrize("num_laps", range(1, 4))
def test_interleaving_divides_the_bubble_by_the_laps(num_ranks: int, num_laps: int) -> None:
    for num_micro_batches in range(num_ranks, 4 * num_ranks + 1, num_ranks):
        schedule = interleaved(_problem(tuple(range(num_ranks)) * num_laps, num_micro_batches, 3, 5))
        assert violations(schedule) == []
        timing = evaluate(schedule)
        assert timing.makespan == (num_micro_batches * num_laps + num_ranks - 1) * (3 + 5)
        assert timing.peak_bytes == tuple(
            min(num_micro_batches * num_laps, (num_laps - 1) * num_ranks + 2 * (num_ranks - 1 - rank) + 1)
            for rank in range(num_ranks)
        )


@pytest.mark.parametrize("num_stages", range(1, 9))
@pytest.mark.parametrize("ticks", [(1, 1, 1), (3, 4, 2), (4, 5, 3)])
def test_zb_h1_shrinks_the_bubble_within_the_memory_of_1f1b(num_stages: int, ticks: tuple[int, int, int]) -> None:
    f, i, w = ticks
    for num_micro_batches in (num_stages, num_stages + 1, 2 * num_stages, 32):
        problem = _problem(tuple(range(num_stages)), num_micro_batches, f, i + w, (i, w))
        schedule = zero_bubble_h1(problem)
        assert violations(schedule) == []
        timing = evaluate(schedule)
        assert timing.makespan == num_micro_batches * (f + i + w) + (num_stages - 1) * (f + i - w)
        assert max(timing.peak_bytes) == max(evaluate(one_f_one_b(problem)).peak_bytes)


def test_zb_h1_with_fewer_micro_batches_than_stages_is_legal() -> None:
    for num_micro_batches in range(1, 5):
        assert violations(zero_bubble_h1(_problem((0, 1, 2, 3), num_micro_batches, 1, 2, (1, 1)))) == []


@pytest.mark.parametrize("num_ranks", range(1, 7))
def test_zb_v_leaves_hardly_more_than_the_way_to_the_last_rank(num_ranks: int) -> None:
    way = tuple(range(num_ranks))
    for num_micro_batches in (num_ranks, num_ranks + 1, 2 * num_ranks, 16):
        schedule = zero_bubble_v(_problem(way + way[::-1], num_micro_batches, 2, 4, (2, 2)))
        assert violations(schedule) == []
        timing = evaluate(schedule)
        ideal = num_micro_batches * 12 + (num_ranks - 1) * 2
        assert ideal <= timing.makespan <= ideal + 2 * max(0, num_ranks - 2)
        assert max(timing.peak_bytes) <= 2 * num_ranks


@pytest.mark.parametrize("num_ranks", range(1, 5))
@pytest.mark.parametrize("transfer_ticks", [1, 3, 20])
def test_zb_v_waits_for_transfers(num_ranks: int, transfer_ticks: int) -> None:
    way = tuple(range(num_ranks))
    for num_micro_batches in {1, num_ranks, 4, 12}:
        problem = _problem(way + way[::-1], num_micro_batches, 2, 4, (2, 2))
        slow = zero_bubble_v(
            replace(problem, pipelines=(replace(problem.pipelines[0], transfer_ticks=transfer_ticks),))
        )
        assert violations(slow) == []
        timing = evaluate(slow)
        assert timing.makespan >= evaluate(zero_bubble_v(problem)).makespan
        assert max(timing.peak_bytes) <= 2 * num_ranks


def _opposite(num_stages: int, num_micro_batches: int) -> Problem:
    down = _problem(tuple(range(num_stages)), num_micro_batches, 1, 1).pipelines[0]
    up = replace(down, name="up", ranks=down.ranks[::-1])
    return Problem(num_ranks=num_stages, pipelines=(down, up))


@pytest.mark.parametrize("num_stages", [2, 4, 6, 8])
def test_chimera_halves_the_bubble(num_stages: int) -> None:
    half = num_stages // 2
    schedule = chimera(_opposite(num_stages, half))
    assert violations(schedule) == []
    timing = evaluate(schedule)
    assert timing.makespan == 3 * num_stages - 2
    assert timing.peak_bytes == tuple(min(half, num_stages - rank) + min(half, rank + 1) for rank in range(num_stages))
    more = chimera(_opposite(num_stages, 3 * half))
    assert violations(more) == []
    assert evaluate(more).makespan <= 3 * timing.makespan


def test_serial_takes_other_baselines() -> None:
    schedule = serial(_opposite(4, 4), interleaved)
    assert violations(schedule) == []


@pytest.mark.parametrize(
    ("baseline", "problem", "reason"),
    [
        (interleaved, _problem((0, 1, 1, 0), 2, 1, 1), "do not go round them in one order"),
        (interleaved, _problem((0, 1, 0), 2, 1, 1), "do not go round them in one order"),
        (interleaved, _problem((0, 1, 0, 1), 3, 1, 1), "3 micro-batches are not a multiple of 2 ranks"),
        (interleaved, _opposite(2, 2), "use serial for several"),
        (zero_bubble_h1, _problem((0, 1), 2, 1, 1), "cannot split backwards"),
        (zero_bubble_h1, _problem((0, 0), 2, 1, 1), "rank 0 has 2 stages"),
        (zero_bubble_v, _problem((0, 1, 0, 1), 2, 1, 2, (1, 1)), "do not go along the ranks and back"),
        (zero_bubble_v, _problem((0,), 2, 1, 2, (1, 1)), "do not go along the ranks and back"),
        (chimera, _problem((0, 1), 2, 1, 1), "for two pipelines, not 1"),
        (chimera, _opposite(3, 3), "it needs an even number"),
        (chimera, _opposite(4, 3), "not a multiple of half the 4 stages"),
        (
            chimera,
            replace(_opposite(2, 1), pipelines=(_opposite(2, 1).pipelines[0], _opposite(2, 2).pipelines[1])),
            "not equal and in opposite directions",
        ),
    ],
)
def test_other_shapes_are_refused(baseline: Callable[[Problem], Schedule], problem: Problem, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        baseline(problem)
