"""Which scorers run within training, what they are planned to gain over scoring first, and when that is given up."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.forward_only import Scorer, with_scorers, without_scorers
from fuse.intrastage.measurement_store import MeasurementStore
from fuse.intrastage.opposite import with_opposites
from fuse.intrastage.placement import Counts, Replica, place
from fuse.intrastage.training_planner import TrainingPlanner
from fuse.intrastage.training_schedule import halved_serial_schedule, serial_schedule
from fuse.trace import Span
from schedules import evaluate, violations

from .test_training_planner import settings, watched

OLD, REFERENCE = Scorer(name="old", model="actor"), Scorer(name="reference", model="actor", ranks=(0, 1))
PLAIN = place("actor", 2, 2)
SHAPE = Shape(1, 64)
FIRST: Counts = (("actor", 4), ("old", 8), ("reference", 4))
LATER: Counts = (("actor", 4), ("reference", 4))


def test_a_scorer_ends_where_its_model_does() -> None:
    placed = with_scorers(PLAIN, [OLD, REFERENCE])
    assert placed == (
        *PLAIN,
        Replica("old", 0, (0, 1), scores="actor"),
        Replica("reference", 0, (0, 1), scores="actor"),
    )
    assert without_scorers(placed) == PLAIN
    schedule = serial_schedule(placed, FIRST)
    assert violations(schedule) == []
    assert [(one.name, one.before) for one in schedule.problem.pipelines] == [
        ("actor", None),
        ("old", 0),
        ("reference", 0),
    ]
    assert violations(halved_serial_schedule(placed, FIRST)) == []


def test_every_opposite_replica_has_its_own() -> None:
    placed = with_scorers(with_opposites(PLAIN), [OLD])
    schedule = serial_schedule(placed, (("actor", 5), ("old", 9)))
    assert violations(schedule) == []
    assert [(one.name, one.ranks, one.num_micro_batches, one.before) for one in schedule.problem.pipelines[2:]] == [
        ("old.0", (0, 1), 5, 0),
        ("old.1", (1, 0), 4, 1),
    ]


def test_what_cannot_be_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert with_scorers(with_opposites(PLAIN), [REFERENCE]) == with_opposites(PLAIN)
        assert with_scorers(place("actor", 2, 1), [OLD]) == place("actor", 2, 1)
    assert "reference: not within training, as its last stage is on another device than one of the actor" in caplog.text
    assert "old: not within training, as the actor has no pipeline" in caplog.text


def told() -> list[Span]:
    """An update's spans: forwards of 6.4 ms at every stage, and backwards of twice as much, in halves."""
    spans = [span for span in watched([SHAPE] * 4) if "actor" in span.name]
    forwards = [span for span in spans if span.name.startswith("F ")]
    return spans + [
        span._replace(name=span.name.replace("actor", name)) for name in ("old", "reference") for span in forwards
    ]


def planner_in(directory: Path, *, forces: bool = False) -> TrainingPlanner:
    placement = with_scorers(PLAIN, [OLD, REFERENCE])
    how = replace(settings(directory), forces_scorers=forces)
    return TrainingPlanner(placement, how, MeasurementStore(directory, {}))


def test_the_plan_is_compared_with_scoring_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    planner = planner_in(tmp_path)
    (plan, _) = planner.plans([FIRST, LATER], [SHAPE]).values()
    assert plan.profile is None, "the first update shows what operations cost"
    assert plan.schedule == halved_serial_schedule(planner.placement, FIRST)
    assert planner.report == {}
    assert planner.scorers == {"old", "reference"}
    planner.observe(told())
    with caplog.at_level(logging.INFO):
        plans = planner.plans([FIRST, LATER], [SHAPE])
        planner.compare()
    forward, seconds = 6.4e-3, {counts: 1e-5 * evaluate(plan.schedule).makespan for counts, plan in plans.items()}
    # Apart: twelve forwards drain, or four; then 1F1B of four micro-batches, forward 1 and backward 2 on two ranks.
    apart = {FIRST: (12 + 1 + 3 * 5) * forward, LATER: (4 + 1 + 3 * 5) * forward}
    gains = [apart[counts] / seconds[counts] - 1 for counts in (FIRST, LATER)]
    assert min(gains) > 0.04
    assert planner.report["gain/forward_only"] == pytest.approx(sum(gains) / 2)
    assert planner.report["bubble/serial"] == pytest.approx(
        1 - (12 * 2 + 4 * 2 * 3 + 8 + 4 * 2 * 3) / 2 / (28 + 20) * 1
    )
    assert "gain/bidirectional" not in planner.report
    assert "old, reference within training: a step of 4 micro-batches of actor, 8 of old, 4 of reference" in caplog.text
    assert "by scoring first and plain 1F1B 0.179 s" in caplog.text
    assert planner.scorers == {"old", "reference"}
    kept = MeasurementStore(tmp_path, {}).load()
    assert kept is not None
    assert kept.placement == PLAIN, "what a later run cuts models by has no scorers"
    assert planner_in(tmp_path).plans([FIRST], [SHAPE])[FIRST].profile == kept.profile


@pytest.mark.parametrize("forces", [False, True])
def test_what_gains_nothing_is_scored_first_unless_it_is_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forces: bool
) -> None:
    monkeypatch.setattr(TrainingPlanner, "_gain", lambda *_: 0.0)
    planner = planner_in(tmp_path, forces=forces)
    planner.observe(told())
    planner.plans([LATER], [SHAPE])
    assert planner.scorers == ({"old", "reference"} if forces else frozenset())
    (plan,) = planner.plans([(("actor", 4),)], [SHAPE]).values()
    assert [one.name for one in plan.schedule.problem.pipelines] == ["actor"]
    assert violations(plan.schedule) == []
