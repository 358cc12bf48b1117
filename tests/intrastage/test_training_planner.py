"""The planner watches an update, plans by what it showed, keeps both on disk, and plans again after drift."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fuse.intrastage import training_planner
from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.measurement_store import Measured, MeasurementStore
from fuse.intrastage.micro_batch_number import Work, shapes_of
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.placement import Replica
from fuse.intrastage.plan_settings import DRIFT_UPDATES, PlanSettings
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.intrastage.training_schedule import fused_schedule
from fuse.trace import Span
from schedules import Kind, Schedule, evaluate, violations
from schedules.fused.cache import ScheduleCache
from schedules.fused.greedy import greedy

PLACEMENT = (Replica("actor", 0, (0, 1)), Replica("critic", 0, (1, 0)))
SHAPES = [Shape(2, 64), Shape(2, 16), Shape(2, 64), Shape(2, 32)]


def watched(shapes: Sequence[Shape], *, num_bytes: int = 1) -> list[Span]:
    """What ranks tell of an update that trained these micro-batches: seconds in proportion to tokens, 1 : 1 : 1."""
    spans = []
    for pipeline in ("actor", "critic"):
        for stage in range(2):
            for index, shape in enumerate(shapes):
                arguments = {"tokens": shape.size, "sequences": shape.num_sequences}
                for kind in "FIW":
                    name = f"{kind} {pipeline}.{stage}.{index}"
                    spans.append(Span(name, "train", 0.0, 1e-4 * shape.size, arguments))
            sizes = {"activation_bytes": num_bytes * shape.size, "weight_grad_bytes": num_bytes * shape.size // 2}
            spans.append(Span(f"memory {pipeline}.{stage}.0", "memory", 0.0, 0.0, arguments | sizes))
    return spans


def settings(
    directory: Path,
    *,
    fused: bool = True,
    memory_limit_bytes: int | None = None,
    time_limit_s: float = 1.0,
    longest: Shape | None = None,
    chooses_number: bool = False,
) -> PlanSettings:
    return PlanSettings(
        fused=fused,
        time_limit_s=time_limit_s,
        num_workers=1,
        num_updates=10,
        steps_per_update=1,
        memory_limit_bytes=memory_limit_bytes,
        replan_drift=0.3,
        directory=directory,
        longest=longest,
        chooses_number=chooses_number,
    )


def planner_in(directory: Path, **options: Any) -> TrainingPlanner:
    return TrainingPlanner(PLACEMENT, settings(directory, **options), MeasurementStore(directory, {}))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_first_update_trains_serially_and_the_next_by_what_it_showed(tmp_path: Path) -> None:
    planner = planner_in(tmp_path)
    assert not planner.will_solve({2, 4})
    for count, plan in planner.plans({2, 4}, SHAPES).items():
        assert plan.profile is None
        assert planner.serial_bubble_ratio is None
        assert violations(plan.schedule) == []
        kinds = [[op.kind for op in ops] for ops in plan.schedule.ranks]
        assert all(Kind.B not in ops and ops.count(Kind.I) == ops.count(Kind.W) == 2 * count for ops in kinds)
        assert all(ops[index + 1] is Kind.W for ops in kinds for index, kind in enumerate(ops) if kind is Kind.I)

    planner.observe(watched(SHAPES))
    assert planner.will_solve({2, 4})
    plans = planner.plans({2, 4}, SHAPES)
    for count, plan in plans.items():
        assert violations(plan.schedule) == []
        assert [pipeline.num_micro_batches for pipeline in plan.schedule.problem.pipelines] == [count, count]
        assert planner.serial_bubble_ratio is not None
        assert evaluate(plan.schedule).bubble_ratio < planner.serial_bubble_ratio
    assert not planner.will_solve({2, 4})
    assert planner.plans({4}, SHAPES) == {4: plans[4]}
    assert planner.serial_bubble_ratio is not None
    assert len(list(tmp_path.glob("*.schedule"))) == 2


BOTH, CRITIC = (("actor", 2), ("critic", 4)), (("critic", 4),)


def test_models_have_their_own_numbers_of_micro_batches_or_none(tmp_path: Path) -> None:
    planner = planner_in(tmp_path)
    for _ in range(2):  # serial, then planned
        plans = planner.plans([BOTH, CRITIC, CRITIC], SHAPES)
        for counts, plan in plans.items():
            assert violations(plan.schedule) == []
            pipelines = plan.schedule.problem.pipelines
            assert tuple((one.name, one.num_micro_batches) for one in pipelines) == counts
        planner.observe(watched(SHAPES))
    assert all(plan.profile is not None for plan in plans.values())
    assert evaluate(plans[BOTH].schedule).bubble_ratio < evaluate(plans[CRITIC].schedule).bubble_ratio


def test_what_did_not_train_yet_is_watched_when_it_does(tmp_path: Path) -> None:
    """The critic alone first: what it showed plans its own steps, and no others."""
    planner = planner_in(tmp_path)
    planner.plans([CRITIC], SHAPES)
    planner.observe([span for span in watched(SHAPES) if "critic" in span.name])
    assert planner.will_solve([CRITIC])
    assert not planner.will_solve([BOTH])
    alone = planner.plans([CRITIC], SHAPES)[CRITIC]
    assert alone.profile is not None
    assert planner.serial_bubble_ratio is not None
    both = planner.plans([BOTH], SHAPES)[BOTH]
    assert both.profile is None
    assert planner.serial_bubble_ratio is None
    assert {op.kind for _, op in both.schedule.ops()} == {Kind.F, Kind.I, Kind.W}
    planner.observe(watched(SHAPES))
    assert planner.will_solve([BOTH])
    plans = planner.plans([BOTH, CRITIC], SHAPES)
    assert plans[BOTH].profile is not None
    assert plans[CRITIC] == alone


def test_serial_bubbles_are_those_of_the_steps_without_fusion(tmp_path: Path) -> None:
    """A step of the actor that is dealt over two of the critic's would drain its pipeline once, not twice."""
    planner = planner_in(tmp_path)
    planner.observe(watched(SHAPES))
    planner.plans([BOTH, BOTH], SHAPES)
    as_dealt = planner.serial_bubble_ratio
    whole = (("actor", 4), ("critic", 4))
    planner.plans([BOTH, BOTH], SHAPES, unfused=[whole, CRITIC])
    assert planner.serial_bubble_ratio is not None
    assert as_dealt is not None
    # A micro-batch takes 3 ticks of a stage. All four micro-batches of both models: 29 ticks with 24 of work on each
    # rank (as below); the critic's alone 15 with 12.
    assert planner.serial_bubble_ratio == pytest.approx(1 - 36 / 44)
    assert as_dealt > planner.serial_bubble_ratio


def test_what_an_earlier_run_measured_plans_the_first_update(tmp_path: Path) -> None:
    first = planner_in(tmp_path)
    first.plans({4}, SHAPES)
    first.observe(watched(SHAPES))
    expected = first.plans({4}, SHAPES)
    assert planner_in(tmp_path).plans({4}, SHAPES) == expected
    elsewhere = replace(PLACEMENT[0], layer_ranges=((0, 1), (1, 4)))
    other = TrainingPlanner((elsewhere, PLACEMENT[1]), settings(tmp_path), MeasurementStore(tmp_path, {}))
    assert other.plans({4}, SHAPES)[4].profile is None, "its stages are others"


def test_a_search_counts_the_steps_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def search(*arguments: Any, num_steps: int, **options: Any) -> Schedule:
        asked.append(num_steps)
        return fused_schedule(*arguments, num_steps=num_steps, **options)

    monkeypatch.setattr(training_planner, "fused_schedule", search)
    planner = planner_in(tmp_path)
    for _ in range(3):
        planner.plans({2, 4}, SHAPES)
        planner.observe(watched(SHAPES))
    assert asked == [9 // 2] * 2, "of ten updates of a step, one is over, and two schedules share the others"
    planner.plans({3}, SHAPES)
    assert asked[2:] == [7 // 3], "seen for the first time in three updates, it comes in a third of the others"


def test_serial_bubbles_are_those_of_stages_cut_for_serial_training(tmp_path: Path) -> None:
    """Uneven stages that suit the fused schedule leave serial training more idle than its own even ones would."""
    own = (replace(PLACEMENT[0], layer_ranges=((0, 2), (2, 4))), replace(PLACEMENT[1], layer_ranges=((0, 2), (2, 4))))
    uneven = watched(SHAPES)
    uneven = [
        span._replace(end_s=2 * span.end_s) if span.name[2:].startswith(("actor.0", "critic.0")) else span
        for span in uneven
    ]
    even_costs = tuple(
        StageCosts(
            pipeline=name,
            stage=stage,
            shape=Shape(2, 64),
            forward_ticks=100,
            backward_ticks=200,
            input_grad_ticks=100,
            weight_grad_ticks=100,
            activation_bytes=1,
            weight_grad_bytes=1,
        )
        for name in ("actor.0", "critic.0")
        for stage in range(2)
    )
    unfused = Measured(own, Profile(tick_s=1e-5, stages=even_costs, transfers=()))
    ratios = []
    for directory, reference in ((tmp_path / "same", None), (tmp_path / "own", unfused)):
        planner = TrainingPlanner(
            PLACEMENT, settings(directory), MeasurementStore(directory, {"of": str(directory)}), reference
        )
        planner.observe(uneven)
        planner.plans({4}, SHAPES)
        ratios.append(planner.serial_bubble_ratio)
    in_fused_stages, in_own_stages = ratios
    # A micro-batch takes 3 ticks of each stage, so 24 of 29: the actor's first backward comes 3 ticks late on rank 0,
    # and the critic, which begins on the rank that is done first, ends 2 after it.
    assert in_own_stages == pytest.approx(5 / 29)
    assert in_fused_stages is not None
    assert in_fused_stages > in_own_stages + 0.05
    kept = MeasurementStore(tmp_path / "own", {"of": str(tmp_path / "own")}).load()
    assert kept is not None
    assert kept.unfused == unfused


def test_without_fusion_nothing_is_learnt_nor_written(tmp_path: Path) -> None:
    planner = planner_in(tmp_path, fused=False)
    planner.observe(watched(SHAPES))
    (plan,) = planner.plans({3}, SHAPES).values()
    assert plan.profile is None
    assert planner.serial_bubble_ratio is None
    assert not list(tmp_path.iterdir())
    assert [op.pipeline for op in plan.schedule.ranks[0]] == [0] * 6 + [1] * 6


@pytest.mark.parametrize(("option", "free"), [(300, None), (None, 300), (300, 10_000)])
def test_memory_must_suffice_for_the_largest(tmp_path: Path, option: int | None, free: int | None) -> None:
    planner = planner_in(tmp_path, memory_limit_bytes=option)
    planner.observe(watched(SHAPES))
    (plan,) = planner.plans({4}, SHAPES, lambda: free).values()
    assert max(evaluate(plan.schedule).peak_bytes) <= 300  # two micro-batches of 2 x 64 tokens
    tight = planner_in(tmp_path, memory_limit_bytes=100)
    with pytest.raises(ValueError, match="rank"):
        tight.plans({4}, SHAPES, lambda: free)


def test_memory_must_suffice_for_the_longest_there_can_be(tmp_path: Path) -> None:
    """Responses grow: a schedule is kept for updates whose micro-batches are longer than those it was made from."""
    for longest, activation_bytes in ((None, 128), (Shape(2, 128), 256)):
        planner = planner_in(tmp_path / str(activation_bytes), longest=longest)
        planner.observe(watched(SHAPES))
        (plan,) = planner.plans({4}, SHAPES, lambda: 600).values()
        pipelines = plan.schedule.problem.pipelines
        assert {one for pipeline in pipelines for one in pipeline.activation_bytes} == {activation_bytes}
        assert max(evaluate(plan.schedule).peak_bytes) <= 600
    tight = planner_in(tmp_path / "tight", longest=Shape(2, 128))
    tight.observe(watched(SHAPES))
    with pytest.raises(ValueError, match="rank"):
        tight.plans({4}, SHAPES, lambda: 200)


def test_solving_takes_no_longer_than_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def solve(*args: Any, time_limit_s: float, **options: Any) -> Any:
        limits.append(time_limit_s)
        return fused_schedule(*args, time_limit_s=time_limit_s, **options)

    monkeypatch.setattr("fuse.intrastage.training_planner.fused_schedule", solve)
    planner = planner_in(tmp_path, time_limit_s=100.0)
    planner.observe(watched(SHAPES))  # its longest operation takes 12.8 ms, and all start at once
    planner.plans({2, 4}, SHAPES)
    assert limits == [pytest.approx(0.0064)] * 2
    planner_in(tmp_path, time_limit_s=100.0).plans({2, 4}, SHAPES)
    assert limits[2] == pytest.approx(2 * 12 * 0.0128 / 2), "before an update: a step of two, on one rank"


def test_an_update_need_not_wait_for_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains by the greedy schedule, the next by what was found meanwhile, and so does the next run at once."""
    limits = []

    def search(*args: Any, time_limit_s: float | None, **options: Any) -> Schedule:
        limits.append(time_limit_s)
        return fused_schedule(*args, time_limit_s=time_limit_s, **options)

    monkeypatch.setattr(training_planner, "fused_schedule", search)
    planner = planner_in(tmp_path)
    planner.observe(watched(SHAPES))
    first = planner.plans({4}, SHAPES, waits=False)[4]
    assert first.schedule == greedy(first.schedule.problem)
    assert not list(tmp_path.glob("*.schedule")), "what was not searched for is not kept"
    stop = threading.Event()
    stop.set()
    planner.search(stop)
    assert limits == [None], "not once devices have trained"
    stop.clear()
    planner.search(stop)
    assert limits == [None, pytest.approx(0.0128)], "not longer than devices may train"
    found = planner.plans({4}, SHAPES, waits=False)[4]
    assert [ScheduleCache(tmp_path).load(found.schedule.problem)] == [found.schedule]
    assert planner_in(tmp_path).plans({4}, SHAPES, waits=False) == {4: found}
    planner.search(stop)
    assert len(limits) == 3, "that schedule was searched for once"


def spans(slowdown: float, *, of_one_stage: float = 1.0) -> list[Span]:
    """What four stages executed, planned at 10 ms each."""
    factors = {"actor.0": of_one_stage, "actor.1": 1.0, "critic.0": 1.0, "critic.1": 1.0}
    planned = {"planned_start_s": 0.0, "planned_end_s": 0.01, "tokens": 128, "sequences": 2}
    return [
        Span(f"{kind} {stage}.0", "train", 0.0, 0.01 * slowdown * factor, planned)
        for stage, factor in factors.items()
        for kind in "FIW"
    ]


def test_only_lasting_drift_of_a_stage_against_the_others_plans_again(tmp_path: Path) -> None:
    planner = planner_in(tmp_path)
    planner.observe(watched(SHAPES))
    planner.plans({4}, SHAPES)

    def plans_again_after(updates: list[list[Span]]) -> bool:
        for update in updates:
            planner.observe(update)
            assert planner.serial_bubble_ratio is not None, "an update that drifts is reported all the same"
        again = planner.will_solve({4})
        planner.plans({4}, SHAPES)
        return again

    drifted = spans(1.0, of_one_stage=2.0)
    assert not plans_again_after([])
    assert not plans_again_after([spans(5.0)] * 20), "a machine that is slower all over changes no schedule"
    assert not plans_again_after([[Span("F actor.0.0", "train", 0.0, 1.0, {"tokens": 8, "sequences": 1})]] * 5)
    assert plans_again_after([drifted]), "what one update alone has shown is corrected by one"
    profile = planner.plans({4}, SHAPES)[4].profile
    assert profile is not None
    costs = {(one.pipeline, one.stage): one.forward_ticks for one in profile.stages if one.shape.size == 128}
    assert costs["actor.0", 0] == 2 * costs["actor.0", 1] == 2000, "and from what has drifted alone"
    assert not plans_again_after([drifted] * (DRIFT_UPDATES - 1))
    assert not plans_again_after([spans(1.0)])
    assert not plans_again_after([drifted] * (DRIFT_UPDATES - 1)), "not in a row"
    assert plans_again_after([spans(1.0, of_one_stage=0.5)])


def test_opposite_replicas_are_compared_with_one_pipeline_of_all_micro_batches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placement = with_opposites((Replica("actor", 0, (0, 1)),))
    spans = [
        span._replace(name=span.name.replace("actor", "actor.0").replace("critic", "actor.1"))
        for span in watched([Shape(1, 64)] * 4)
    ]
    gains = []
    for name, updates in (("operations", None), ("updates, too", (0.02, 0.01))):
        directory = tmp_path / name
        both_s, plain_s = updates or (None, None)
        unfused = Measured((Replica("actor", 0, (0, 1)),), None, None, plain_s)
        planner = TrainingPlanner(
            placement, settings(directory), MeasurementStore(directory, {"of": name}), unfused, both_s
        )
        assert planner.opposite_gain is None
        planner.plans({4}, [Shape(1, 64)])
        planner.observe(spans)
        with caplog.at_level(logging.INFO):
            (plan,) = planner.plans({4}, [Shape(1, 64)]).values()
            planner.compare()
        assert [one.num_micro_batches for one in plan.schedule.problem.pipelines] == [2, 2]
        # Operations take 6.4 ms. Of one pipeline, 3 of 15 are bubbles: forward 1, backward 2, four micro-batches.
        assert planner.serial_bubble_ratio == pytest.approx(1 / 5)
        gains.append(planner.opposite_gain)
        kept = MeasurementStore(directory, {"of": name}).load()
        assert kept is not None
        assert kept.update_s == both_s
    makespan_s = 1e-5 * evaluate(plan.schedule).makespan
    assert makespan_s < 15 * 6.4e-3
    assert gains[0] == pytest.approx(15 * 6.4e-3 / makespan_s - 1)
    assert gains[1] == pytest.approx((15 * 6.4e-3 + 0.01) / (makespan_s + 0.02) - 1)
    assert "by plain 1F1B 0.096 s" in caplog.text
    assert "by plain 1F1B 0.106 s" in caplog.text


def test_one_pipeline_is_not_fused_with_itself(tmp_path: Path) -> None:
    planner = TrainingPlanner((Replica("actor", 0, (0, 1)),), settings(tmp_path), MeasurementStore(tmp_path, {}))
    planner.observe(watched(SHAPES))
    (plan,) = planner.plans({4}, SHAPES).values()
    assert plan.profile is None
    assert {op.kind for ops in plan.schedule.ranks for op in ops} == {Kind.F, Kind.B}


# The number of micro-batches


def divided(times: float, models: Sequence[str] = ("actor", "critic")) -> list[Work]:
    """A round of two micro-batches of the models, or of more and smaller ones."""
    number = round(2 * times)
    return [Work(dict.fromkeys(models, (Shape(2, 192 // number),) * number))]


VARIED = [Shape(2, 96), Shape(1, 96), Shape(1, 48), Shape(1, 48)] * 2
DRAWN, CRITIC_DRAWN = (("actor", 2), ("critic", 2)), (("critic", 2),)
critic_divided = partial(divided, models=("critic",))


@pytest.mark.parametrize("fused", [True, False])
def test_the_number_of_micro_batches_is_decided_once_and_kept(
    tmp_path: Path, fused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Operations take time in proportion to tokens: the more the better, where there are bubbles."""
    planner = planner_in(tmp_path, fused=fused, chooses_number=True)
    assert planner.times([DRAWN], divided) is None
    (plan,) = planner.plans([DRAWN], VARIED).values()
    assert plan.is_watched
    planner.observe(watched(VARIED))
    with caplog.at_level(logging.INFO):
        assert planner.times([CRITIC_DRAWN], critic_divided) == 4.0
        assert planner.times([DRAWN], divided) == 4.0, "two models of a size leave no bubbles, but hold less"
    assert "8 micro-batches of critic, dealt from 2 micro-batches of critic: an update's steps are" in caplog.text
    counts = critic_divided(4.0)[0].counts
    (plan,) = planner.plans([counts], shapes_of(critic_divided(4.0))).values()
    assert not plan.is_watched
    assert [one.num_micro_batches for one in plan.schedule.problem.pipelines] == [8]

    def unasked(times: float) -> list[Work]:
        raise AssertionError("it is known")

    for known in (planner, planner_in(tmp_path, fused=fused, chooses_number=True)):
        assert known.times([CRITIC_DRAWN], unasked) == 4.0
    assert planner_in(tmp_path, fused=fused).times([CRITIC], unasked) == 1.0, "the caller's number"


def test_operations_that_cost_the_same_whatever_their_size_keep_the_number(tmp_path: Path) -> None:
    planner = planner_in(tmp_path, chooses_number=True)
    trained = [span for span in watched(VARIED) if span.category == "train"]
    planner.observe([span._replace(end_s=span.start_s + 0.01) for span in trained])
    assert planner.times([CRITIC_DRAWN], critic_divided) == 1.0


def test_sizes_that_were_not_observed_keep_the_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One size, or too few operations, do not tell what others would cost."""
    for name, shapes in (("one size", [Shape(2, 96)] * 8), ("few", VARIED[:4])):
        planner = planner_in(tmp_path / name, chooses_number=True)
        planner.observe(watched(shapes))
        with caplog.at_level(logging.INFO):
            assert planner.times([CRITIC_DRAWN], critic_divided) == 1.0
        assert "what others would cost has not been observed" in caplog.messages[-1]
        (tmp_path / "cache").rename(tmp_path / f"cache of {name}")


def test_what_trains_later_is_decided_later(tmp_path: Path) -> None:
    """The critic alone at first, then both; drift leaves the numbers what they are."""
    planner = planner_in(tmp_path, chooses_number=True)
    planner.observe([span for span in watched(VARIED) if "critic" in span.name])
    assert planner.times([CRITIC_DRAWN], critic_divided) == 4.0
    assert planner.times([DRAWN], divided) is None
    planner.observe(watched(VARIED))
    assert planner.times([DRAWN], divided) == 4.0
    planner.plans([CRITIC_DRAWN], VARIED)
    planner.observe(spans(1.0, of_one_stage=2.0))
    assert planner.will_solve([CRITIC_DRAWN])
    assert planner.times([CRITIC_DRAWN], critic_divided) == 4.0
