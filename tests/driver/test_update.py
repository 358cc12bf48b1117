"""What the driver does around an update, without workers."""

from __future__ import annotations

from typing import Any

import pytest

from fuse.driver import update
from fuse.intrastage.placement import place
from fuse.intrastage.training_schedule import Plan, serial_schedule
from schedules import Schedule


def test_plans_are_checked_for_all_ranks_before_any_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(update.ray, "put", lambda value: told.append(value) or value)
    counts = (("actor", 2),)
    legal = serial_schedule((*place("actor", 2, 2),), counts)
    nothing: Any = None

    def take(schedule: Schedule) -> None:
        args: list[Any] = [[], nothing, [], [], {counts: Plan(schedule)}]
        update.take_rounds(*args, pieces=[slice(0)], between=nothing)

    with pytest.raises(ValueError, match="illegal schedule"):
        take(Schedule(legal.problem, legal.ranks[::-1]))
    assert not told
    take(legal)
    assert told[0] == {counts: Plan(legal, is_checked=True)}
