"""Forward-only pipelines: what they ask of a problem, the order they ask of a schedule, and what they gain."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from schedules import Kind, Op, Pipeline, Problem, Schedule, check, evaluate, violations
from schedules.baselines import chimera, one_f_one_b, serial
from schedules.bounds import makespan_lower_bound
from schedules.export.pipelining import pipelining_csv
from schedules.formats import problem_from_text, problem_to_text
from schedules.fused.cpsat import Outcome, shortest
from schedules.fused.exhaustive import optimum
from schedules.fused.greedy import greedy
from schedules.fused.pattern import find_pattern
from schedules.fused.solve import Objective, solve
from schedules.random_problems import random_problem, random_schedule
from schedules.validate import Rule

ACTOR = Pipeline(
    name="actor",
    ranks=(0, 1, 2, 3),
    num_micro_batches=8,
    forward_ticks=(1,) * 4,
    backward_ticks=(2,) * 4,
    activation_bytes=(1,) * 4,
)
REFERENCE = Pipeline(
    name="reference", ranks=(0, 1, 2, 3), num_micro_batches=8, forward_ticks=(1,) * 4, backward_ticks=(), before=0
)
PROBLEM = Problem(num_ranks=4, pipelines=(ACTOR, REFERENCE))


def _scored(micro_batch: int, pipeline: int = 1) -> Op:
    return Op(pipeline, 3, micro_batch, Kind.F)


def test_a_loss_before_its_reference_is_refused() -> None:
    schedule = greedy(PROBLEM)
    check(schedule)
    order = list(schedule.ranks[3])
    loss, reference = order.index(_scored(5, 0)), order.index(_scored(5))
    order[loss], order[reference] = order[reference], order[loss]
    (found,) = violations(Schedule(PROBLEM, (*schedule.ranks[:3], tuple(order))))[:1]
    assert found.rule is Rule.DEPENDENCY
    assert str(found.op) == "F0.3.5"
    assert "it needs F1.3.5" in found.message


def test_ranks_that_wait_for_a_reference_in_a_circle_are_named() -> None:
    # Rank 0 scores only after the first gradient has come back to it; the loss waits for what it would score.
    actor = Pipeline(name="a", ranks=(0, 1), num_micro_batches=1, forward_ticks=(1, 1), backward_ticks=(1, 1))
    scorer = Pipeline(name="r", ranks=(0, 1), num_micro_batches=1, forward_ticks=(1, 1), backward_ticks=(), before=0)
    orders = ("F0.0.0 B0.0.0 F1.0.0", "F1.1.0 F0.1.0 B0.1.0")
    schedule = Schedule(
        Problem(num_ranks=2, pipelines=(actor, scorer)), tuple(tuple(map(Op.parse, each.split())) for each in orders)
    )
    assert {one.rule for one in violations(schedule)} == {Rule.DEADLOCK}
    with pytest.raises(ValueError, match="deadlocks"):
        evaluate(schedule)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_bytes": (1,) * 4}, "neither halves of backwards nor memory"),
        ({"input_grad_ticks": (1,) * 4, "weight_grad_ticks": (1,) * 4}, "neither halves"),
        ({"before": 2}, "before is 2; the pipelines are 0..1"),
        ({"before": 1}, "before is reference, which is forward-only"),
        ({"before": -1}, "the least is 0"),
        ({"ranks": (3, 2, 1, 0)}, "last stage is on rank 3 and not on rank 0"),
        ({"num_micro_batches": 7}, "has 8 micro-batches and not at most 7"),
        ({"backward_ticks": (1,) * 4}, "before is for forward-only pipelines"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Problem(num_ranks=4, pipelines=(ACTOR, replace(REFERENCE, **changes)))  # type: ignore[arg-type]


def test_it_fills_the_bubbles_of_training() -> None:
    # Apart: (8 + 3) + (8 + 3) * 3. In one order after the other, training starts while the last micro-batches are
    # scored. No less is possible with whole backwards: the last rank starts at 3, works 8 * 4, and 3 backwards follow.
    after = serial(PROBLEM, one_f_one_b)
    check(after)
    assert evaluate(after).makespan == 41
    assert makespan_lower_bound(PROBLEM) == 3 + 32 + 6 == 41
    # Samples of later steps may be scored at any time: in the bubbles of this step, too.
    later = Problem(num_ranks=4, pipelines=(ACTOR, replace(REFERENCE, num_micro_batches=16)))
    assert evaluate(serial(later, one_f_one_b)).makespan == 49
    found = solve(later, time_limit_s=120.0, num_workers=1, objective=Objective.MAKESPAN).schedule
    assert evaluate(found).makespan == makespan_lower_bound(later) == 3 + 8 * 4 + 8


def test_a_rank_with_several_stages_scores_by_laps() -> None:
    scorer = replace(REFERENCE, ranks=(0, 1, 0, 1), before=None)
    schedule = serial(Problem(num_ranks=2, pipelines=(scorer,)))
    check(schedule)
    assert evaluate(schedule).makespan == 8 * 2 + 1


def test_bound_program_and_enumeration_agree_on_tiny_problems() -> None:
    random, num_tried = Random(3), 0
    while num_tried < 8:
        problem = random_problem(
            random, max_ranks=2, max_pipelines=1, max_stages=2, max_micro_batches=2, max_ticks=5, max_forward_only=1
        )
        whole = tuple(replace(one, input_grad_ticks=None, weight_grad_ticks=None) for one in problem.pipelines)
        problem = replace(problem, pipelines=whole)
        alone = all(len(set(one.ranks)) == one.num_stages for one in whole)
        if not alone or not any(one.before is not None for one in whole):
            continue
        num_tried += 1
        best = evaluate(optimum(problem)).makespan
        found = shortest(problem, split=False, makespan=evaluate(greedy(problem)).makespan, time_limit_s=120.0)
        assert (found.outcome, found.value) == (Outcome.OPTIMAL, best)
        assert found.schedule is not None
        assert not violations(found.schedule)
        assert makespan_lower_bound(problem) <= best <= evaluate(random_schedule(problem, random)).makespan


def test_files_say_which_version_they_need() -> None:
    text = problem_to_text(PROBLEM)
    assert text.startswith("problem 2\n")
    assert "\nbackward_ticks\n" in text
    assert "\nbefore 0\n" in text
    assert problem_from_text(text) == PROBLEM
    assert problem_to_text(Problem(num_ranks=4, pipelines=(ACTOR,))).startswith("problem 1\n")
    with pytest.raises(ValueError, match="forward-only pipelines are of version 2, not 1"):
        problem_from_text(text.replace("problem 2", "problem 1"))
    with pytest.raises(ValueError, match="this reader knows 1 to 2"):
        problem_from_text(text.replace("problem 2", "problem 3"))


def test_what_knows_only_training_refuses_it() -> None:
    with pytest.raises(ValueError, match="use serial for forward-only ones"):
        one_f_one_b(Problem(num_ranks=4, pipelines=(replace(REFERENCE, before=None),)))
    opposite = replace(REFERENCE, before=None, name="other", ranks=(3, 2, 1, 0))
    with pytest.raises(ValueError, match="are not equal"):
        chimera(Problem(num_ranks=4, pipelines=(replace(REFERENCE, before=None), opposite)))
    with pytest.raises(ValueError, match="reference is forward-only"):
        pipelining_csv(greedy(PROBLEM))
    assert find_pattern(PROBLEM, time_limit_s=1.0) is None
