"""Stored solutions of the instances that RLHFuse's authors published: still legal, shortest possible, and leaner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schedules import evaluate, violations
from schedules.bounds import makespan_lower_bound
from schedules.formats import schedule_from_text, schedule_to_text
from schedules.instances import actor_and_critic

DIRECTORY = Path(__file__).parents[2] / "golden" / "schedules"

# Stages of actor and critic, their micro-batches, forward ticks, activations; the makespan bound, the memory they
# must not exceed (that published, or less: our own target).
INSTANCES: dict[str, tuple[tuple[float, ...], int, float]] = {
    "exp0": ((8, 4, 32, 16, 5, 4, 1.95, 2), 708, 16.0),
    "exp1": ((8, 4, 16, 8, 5, 4, 1.95, 2), 372, 15.75),
    "exp2": ((8, 4, 8, 4, 5, 4, 1.95, 2), 225, 15.6),
    "exp3": ((8, 8, 32, 32, 5, 2, 1.95, 1), 702, 16.0),
    "exp4": ((8, 8, 16, 16, 5, 2, 1.95, 1), 366, 16.0),
    "exp5": ((8, 8, 8, 8, 5, 2, 1.95, 1), 225, 15.6),
    "exp6": ((16, 8, 64, 32, 2, 2, 1.64, 2), 618, 36.0),
    "exp7": ((16, 8, 32, 16, 2, 2, 1.64, 2), 330, 27.0),
    "exp8": ((16, 8, 16, 8, 2, 2, 1.64, 2), 186, 26.24),
    "exp9": ((16, 16, 64, 64, 2, 1, 1.64, 1), 606, 30.0),
    "exp10": ((16, 16, 32, 32, 2, 1, 1.64, 1), 318, 28.0),
    "exp11": ((16, 16, 16, 16, 2, 1, 1.64, 1), 186, 26.24),
}


@pytest.mark.parametrize("name", INSTANCES)
def test_stored_solution(name: str) -> None:
    values, makespan, most_memory = INSTANCES[name]
    names = ("actor_stages", "critic_stages", "actor_microbatches", "critic_microbatches")
    names += ("actor_forward", "critic_forward", "actor_activation", "critic_activation")
    shape: dict[str, Any] = dict(zip(names, values, strict=True))
    instance = actor_and_critic(**shape)
    text = (DIRECTORY / f"{name}.schedule").read_text()
    schedule = schedule_from_text(text)
    assert schedule_to_text(schedule) == text
    assert schedule.problem == instance.problem
    assert violations(schedule) == []
    timing = evaluate(schedule)
    assert timing.makespan == makespan == makespan_lower_bound(instance.problem)
    assert instance.units(max(timing.peak_bytes)) <= most_memory
