"""How a run's training is scheduled, as users have set it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fuse.intrastage.cost_profile import Shape

DRIFT_UPDATES = 3
"""Updates in a row that must have drifted before training is planned again, for disturbances pass.

A plan that rests on a single update, the run's first, is different: one update that has drifted corrects it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """How training is scheduled.

    fused: all models at once; if not, one after the other.
    time_limit_s, num_workers: for the solver, per update that needs schedules.
    num_updates, steps_per_update: that are left of the run, rounds of each, for which schedules are searched.
    memory_limit_bytes: for the micro-batches under way on a device; None: what it has free, on CPUs no limit.
    forces_scorers: what can be scored within training is, whatever it gains.
    replan_drift: plan again once a stage's share of the time is off the plan by more than this (0.3 is 30 %) for
        `DRIFT_UPDATES` updates in a row.
    directory: where the run's measurements and schedules are kept.
    longest: the largest micro-batch there can be, for which there must be memory; None for the largest there was.
    chooses_number: of micro-batches, which pays for pipelines; if not, there are as many as the caller says.
    """

    fused: bool
    time_limit_s: float
    num_workers: int
    num_updates: int
    steps_per_update: int
    memory_limit_bytes: int | None
    replan_drift: float
    directory: Path
    longest: Shape | None = None
    chooses_number: bool = False
    forces_scorers: bool = False
