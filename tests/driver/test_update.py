"""What the driver does around an update, without workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from fuse.driver import update
from fuse.driver.planned_spans import PlannedSpans
from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.micro_batch_number import Work
from fuse.intrastage.placement import Counts, place
from fuse.intrastage.planned_times import planned_times
from fuse.intrastage.program import program_of
from fuse.intrastage.training_schedule import Plan, RankPlan, serial_schedule
from fuse.trace import Span
from fuse.training.layout import RaggedLayout
from fuse.training.rounds import Round, StepPart
from fuse.training.update_piece import UpdatePiece
from schedules import Schedule

PLACEMENT = place("actor", 2, 2)
SHAPES = (Shape(2, 10), Shape(2, 30))
COUNTS = (("actor", 2),)
PROFILE = Profile(
    tick_s=1e-3,
    stages=tuple(
        StageCosts(
            pipeline="actor.0",
            stage=stage,
            shape=SHAPES[0],
            forward_ticks=10 + stage,
            backward_ticks=20,
            input_grad_ticks=None,
            weight_grad_ticks=None,
            activation_bytes=0,
            weight_grad_bytes=0,
        )
        for stage in range(2)
    ),
    transfers=(),
)
PLAN = Plan(serial_schedule(PLACEMENT, COUNTS), PROFILE)


def test_ranks_are_told_programs_of_legal_schedules_and_no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[UpdatePiece] = []
    monkeypatch.setattr(update.ray, "put", told.append)
    monkeypatch.setattr(update, "gather", lambda calls: [])

    def take(plan: Plan) -> None:
        update.take_rounds([], None, [1], [{}], {COUNTS: plan}, pieces=[slice(1)], between=lambda: None)  # type: ignore[arg-type]

    take(replace(PLAN, is_watched=True))
    assert told[0].plans == {COUNTS: RankPlan(program_of(PLAN.schedule), is_watched=True)}
    with pytest.raises(ValueError, match="illegal schedule"):
        take(Plan(Schedule(PLAN.schedule.problem, PLAN.schedule.ranks[::-1])))
    assert len(told) == 1


def test_plans_are_timed_while_devices_train(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Device:
        def train(self, piece: UpdatePiece) -> str:
            events.append(f"told {piece.rounds}")
            return "call"

    monkeypatch.setattr(update.ray, "put", lambda value: value)
    monkeypatch.setattr(update, "gather", lambda calls: events.append("waited") or [[] for _ in calls])
    args: list[Any] = [[Device(), Device()], None, [1, 2], [{}, {}], {COUNTS: PLAN}]
    update.take_rounds(
        *args,
        pieces=[slice(0, 1), slice(1, 2)],
        between=lambda: events.append("between"),
        meanwhile=lambda: events.append("timed"),
    )
    assert events == ["told [1]", "told [1]", "timed", "waited", "between", "told [2]", "told [2]", "waited"]


@pytest.mark.parametrize("num_trained", [0, 1])
def test_no_update_waits_for_a_schedule_of_what_was_not_trained_early(
    num_trained: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much that is differs; a search for it goes on while devices train, and no longer."""
    events: list[object] = []

    def search(stop: threading.Event) -> None:
        assert stop.wait(60)
        events.append("searched")

    def plans(*_: object, waits: bool) -> dict[Counts, Plan]:
        events.append(f"planned, {waits=}")
        return {COUNTS: PLAN}

    def trained(*_: object, meanwhile: Callable[[], None], **options: Any) -> list[Any]:
        meanwhile()
        return [[]]

    part = StepPart(micro_batches=((0,), (1,)), weights=(1.0, 1.0), is_last=True)
    rounds = [Round({"actor": part})]
    planner: Any = SimpleNamespace(
        placement=PLACEMENT,
        will_solve=lambda _: True,
        plans=plans,
        compare=lambda: events.append("compared"),
        search=search,
    )
    tail: Any = SimpleNamespace(
        num_trained=num_trained, rest=lambda *_: rounds, whole=lambda _, of_rest, results: (of_rest, results)
    )
    settings: Any = SimpleNamespace(layout=RaggedLayout(), tensor_parallel_size=1, losses={})
    monkeypatch.setattr(update, "dealt", lambda drawn, *_: drawn)
    monkeypatch.setattr(update, "take_rounds", trained)
    experience: Any = SimpleNamespace(prompts=((1, 2), (1,)), lengths=(3, 4))
    train: Callable[[], Any] = partial(
        update.train,
        *([None], planner, settings, experience, rounds, [{}]),
        late_columns=(),
        tail=tail,
        pieces=[slice(1)],
        between=lambda: None,
        meanwhile=[lambda: events.append("training")],
        memory=None,
        tell=events.append,
    )
    train()
    waits = not num_trained
    solving = ["solving: the fused schedule"] if waits else []
    assert events == [*solving, f"planned, {waits=}", "training", "training", "compared", "searched"]

    def fail(stop: threading.Event) -> None:
        raise ZeroDivisionError

    planner.search = fail
    with pytest.raises(ZeroDivisionError):
        train()


def test_spans_of_all_devices_of_a_rank_say_when_their_operations_were_to_run() -> None:
    works = [Work({"actor": SHAPES}), Work({"actor": SHAPES[:1]})]
    unplanned = Plan(serial_schedule(PLACEMENT, (("actor", 1),)))
    planned = PlannedSpans.of(works, {COUNTS: PLAN, works[1].counts: unplanned}, PLACEMENT, tensor_parallel_size=2)
    num_spans = [len(PLAN.schedule.ranks[rank]) + len(unplanned.schedule.ranks[rank]) for rank in range(2)]
    told = planned.beside([[Span("", "train", 0.0, 1.0)] * num_spans[device // 2] for device in range(4)])
    times = planned_times(PLAN.schedule, PROFILE, ["actor.0"], [SHAPES])
    for device, spans in enumerate(told):
        of_rank = times.of_rank(device // 2)
        assert [span.arguments for span in spans] == [
            *({"planned_start_s": start_s, "planned_end_s": end_s} for start_s, end_s in of_rank),
            *({} for _ in spans[len(of_rank) :]),
        ]
