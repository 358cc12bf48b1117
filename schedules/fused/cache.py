"""Solved schedules on disk, found again by the problem's hash, so that a training run solves a problem once."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from schedules.files import dispensable, write_whole
from schedules.formats import problem_to_text, schedule_from_text, schedule_to_text
from schedules.ir import Problem, Schedule
from schedules.timing import evaluate
from schedules.validate import violations

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ScheduleCache:
    """One text file per problem in `directory`; any number of processes may read and write them at once."""

    directory: Path

    def path(self, problem: Problem) -> Path:
        """Where the problem's schedule is kept: a hash of everything the problem says."""
        return self.directory / f"{hashlib.sha256(problem_to_text(problem).encode()).hexdigest()}.schedule"

    def load(self, problem: Problem) -> Schedule | None:
        """The schedule kept for this problem; a file that is damaged, of another problem, or illegal is discarded."""
        path = self.path(problem)
        try:
            schedule = schedule_from_text(path.read_text(encoding="utf-8"))
        except OSError:  # none is kept, or none can be
            return None
        except (ValueError, UnicodeDecodeError) as error:
            _discard(path, str(error))
            return None
        found = violations(schedule)
        if schedule.problem != problem or found:
            _discard(path, str(found[0]) if found else "it is of another problem")
            return None
        return schedule

    def store(self, schedule: Schedule) -> None:
        """Keep the schedule, unless a better one is kept already; where it cannot be written there is a warning.

        Raises:
            ValueError: the schedule is illegal.
        """
        found = violations(schedule)
        if found:
            raise ValueError(f"illegal schedules are not kept: {found[0]}")
        kept = self.load(schedule.problem)
        if kept is not None and _quality(kept) <= _quality(schedule):
            return
        path = self.path(schedule.problem)
        with dispensable(path):
            write_whole(path, schedule_to_text(schedule))


def _quality(schedule: Schedule) -> tuple[int, int]:
    timing = evaluate(schedule)
    return timing.makespan, max(timing.peak_bytes)


def _discard(path: Path, reason: str) -> None:
    _logger.warning("discarded cached schedule %s: %s", path, reason)
    with dispensable(path):
        path.unlink(missing_ok=True)
