"""What is kept is found again, and nothing else ever is."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from schedules import Pipeline, Problem, Schedule, evaluate
from schedules.baselines import gpipe, one_f_one_b
from schedules.formats import schedule_to_text
from schedules.fused.cache import ScheduleCache
from schedules.random_problems import random_schedule

PROBLEM = Problem(
    num_ranks=2,
    pipelines=(
        Pipeline(
            name="m",
            ranks=(0, 1),
            num_micro_batches=3,
            forward_ticks=(1, 1),
            backward_ticks=(2, 2),
            activation_bytes=(1, 1),
        ),
    ),
)


def test_an_empty_cache_has_nothing(tmp_path: Path) -> None:
    assert ScheduleCache(tmp_path / "absent").load(PROBLEM) is None


def test_what_is_stored_is_loaded(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path / "new")
    cache.store(one_f_one_b(PROBLEM))
    assert cache.load(PROBLEM) == one_f_one_b(PROBLEM)
    assert cache.load(replace(PROBLEM, memory_limit_bytes=(9, 9))) is None
    assert [path.suffix for path in cache.directory.iterdir()] == [".schedule"]


def test_the_better_schedule_stays(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path)
    cache.store(gpipe(PROBLEM))
    cache.store(one_f_one_b(PROBLEM))  # as fast, with less memory
    cache.store(gpipe(PROBLEM))
    assert cache.load(PROBLEM) == one_f_one_b(PROBLEM)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not a schedule",
        schedule_to_text(one_f_one_b(PROBLEM))[:-40],
        schedule_to_text(one_f_one_b(replace(PROBLEM, initial_bytes=(1, 1)))),
        schedule_to_text(replace(one_f_one_b(PROBLEM), ranks=one_f_one_b(PROBLEM).ranks[::-1])),
    ],
)
def test_a_file_that_does_not_validate_is_discarded(tmp_path: Path, content: str) -> None:
    cache = ScheduleCache(tmp_path)
    cache.path(PROBLEM).write_text(content)
    assert cache.load(PROBLEM) is None
    assert not cache.path(PROBLEM).exists()
    cache.store(one_f_one_b(PROBLEM))
    assert cache.load(PROBLEM) == one_f_one_b(PROBLEM)


def test_an_illegal_schedule_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="illegal schedules are not kept: rank 0"):
        ScheduleCache(tmp_path).store(Schedule(PROBLEM, ((), ())))
    assert list(tmp_path.iterdir()) == []


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    cache = ScheduleCache(tmp_path)
    schedules = [random_schedule(PROBLEM, Random(seed)) for seed in range(40)]
    cache.store(schedules[0])
    writers = [threading.Thread(target=cache.store, args=(schedule,)) for schedule in schedules]
    for writer in writers:
        writer.start()
    seen = [cache.load(PROBLEM) for _ in range(40)]
    for writer in writers:
        writer.join()
    assert all(schedule in schedules for schedule in seen)
    assert list(tmp_path.iterdir()) == [cache.path(PROBLEM)]
    assert evaluate(cache.load(PROBLEM) or schedules[0]).makespan <= evaluate(schedules[0]).makespan


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ScheduleCache(tmp_path / "file")
    cache.store(random_schedule(PROBLEM, Random(0)))
    assert cache.load(PROBLEM) is None
    assert [message for message in caplog.messages if "are not kept in" in message] == caplog.messages != []
