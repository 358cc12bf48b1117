"""Every known schedule of a problem, side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules import Problem, evaluate
from schedules.baselines import one_f_one_b, serial
from schedules.bounds import makespan_lower_bound
from schedules.compare import compare, in_laps, table
from schedules.instances import actor_and_critic


def problem(*, critic_forward: int = 2, split: bool = True) -> Problem:
    return actor_and_critic(
        actor_stages=4,
        critic_stages=4,
        actor_microbatches=4,
        critic_microbatches=4,
        actor_forward=2,
        critic_forward=critic_forward,
        actor_activation=2,
        critic_activation=2,
        split_backward=split,
    ).problem


def test_every_schedule_is_there_and_none_beats_the_bound() -> None:
    rows = compare(problem(), {"found": serial(problem())})
    assert [row.name for row in rows] == [
        *("serial GPipe", "serial 1F1B", "serial interleaved", "serial zero-bubble", "Chimera", "greedy", "found"),
    ]
    timings = {row.name: row.timing for row in rows if row.timing}
    assert len(timings) == len(rows)
    for timing in timings.values():
        assert timing.makespan >= makespan_lower_bound(problem())
    makespans = {name: timing.makespan for name, timing in timings.items()}
    assert makespans["serial interleaved"] < makespans["serial 1F1B"] == makespans["found"]
    assert makespans["serial zero-bubble"] < makespans["serial 1F1B"]
    assert makespans["Chimera"] < makespans["serial 1F1B"]


def test_what_cannot_be_says_why() -> None:
    rows = {row.name: row for row in compare(problem(critic_forward=1, split=False))}
    assert "not equal and in opposite directions" in rows["Chimera"].refusal
    assert "cannot split backwards" in rows["serial zero-bubble"].refusal
    assert "forward_ticks 1 cannot be cut into 2 equal parts" in rows["serial interleaved"].refusal
    text = table(problem(), list(rows.values()))
    assert "not equal and in opposite directions" in text


def test_the_table_has_the_figures() -> None:
    limited = replace(problem(), memory_limit_bytes=(6, 6, 6, 6))
    timing = evaluate(serial(limited, one_f_one_b))
    lines = table(limited, compare(limited)).splitlines()
    row = next(line for line in lines if line.startswith("serial 1F1B"))
    assert f"{timing.makespan} " in row
    assert f"{timing.bubble_ratio:.1%}" in row
    assert row.endswith("8  over the limit")
    assert not next(line for line in lines if line.startswith("greedy")).endswith("over the limit")
    assert lines[-1].split() == ["lower", "bound", str(makespan_lower_bound(limited))]


def test_laps_keep_the_work_of_every_rank() -> None:
    cut = in_laps(problem(), 2)
    assert cut.pipelines[1].ranks == (3, 2, 1, 0, 3, 2, 1, 0)
    assert sum(cut.pipelines[0].forward_ticks) == sum(problem().pipelines[0].forward_ticks)
    with pytest.raises(ValueError, match="forward_ticks 2 cannot be cut into 3 equal parts"):
        in_laps(problem(), 3)
