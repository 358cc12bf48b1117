"""Serial: one model after the other on the shared ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from schedules import Pipeline, Problem, Schedule, evaluate, violations
from schedules.baselines import gpipe, one_f_one_b, serial


def _model(name: str, ranks: tuple[int, ...], num_micro_batches: int, ticks: int) -> Pipeline:
    stages = len(ranks)
    return Pipeline(
        name=name,
        ranks=ranks,
        num_micro_batches=num_micro_batches,
        forward_ticks=(ticks,) * stages,
        backward_ticks=(2 * ticks,) * stages,
        activation_bytes=(1,) * stages,
    )


def test_same_direction_costs_the_sum_of_both_works() -> None:
    # Same placement and direction: the second model follows on every rank without another bubble.
    problem = Problem(num_ranks=4, pipelines=(_model("a", (0, 1, 2, 3), 6, 1), _model("b", (0, 1, 2, 3), 6, 1)))
    schedule = serial(problem)
    assert violations(schedule) == []
    first = evaluate(one_f_one_b(Problem(num_ranks=4, pipelines=problem.pipelines[:1]))).makespan
    assert first < evaluate(schedule).makespan <= 2 * first


@pytest.mark.parametrize("baseline", [gpipe, one_f_one_b])
def test_opposite_directions_and_replicas(baseline: Callable[[Problem], Schedule]) -> None:
    actor = _model("actor", (0, 1, 2, 3), 8, 5)
    problem = Problem(num_ranks=4, pipelines=(actor, _model("c0", (1, 0), 4, 4), _model("c1", (3, 2), 4, 4)))
    schedule = serial(problem, baseline)
    assert violations(schedule) == []
    alone = [evaluate(one_f_one_b(Problem(num_ranks=4, pipelines=(p,)))).makespan for p in problem.pipelines]
    assert max(alone) <= evaluate(schedule).makespan <= alone[0] + max(alone[1:])
    for order in schedule.ranks:
        models = [op.pipeline > 0 for op in order]
        assert models == sorted(models)  # no critic operation before the actor is through


def test_a_rank_may_have_nothing_to_do() -> None:
    problem = Problem(num_ranks=3, pipelines=(_model("a", (0, 1), 2, 1), _model("b", (1, 0), 2, 1)))
    assert serial(problem).ranks[2] == ()
