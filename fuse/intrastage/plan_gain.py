"""What a plan gains over 1F1B without opposite replicas, and after scoring where it scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fuse.intrastage.cost_profile import Profile, Shape
from fuse.intrastage.measurement_store import Measured
from fuse.intrastage.placement import Counts, Replica, describe, replicas_of
from fuse.intrastage.training_schedule import Plan, unfused_timing
from schedules import evaluate

_logger = logging.getLogger(__name__)


def plan_gain(
    plan: Plan,
    counts: Counts,
    unfused_ticks: tuple[int, int],
    updates_s: tuple[float | None, float | None],
    *,
    is_opposite: bool,
    scorers: Sequence[str],
) -> float:
    """Seconds of a step by plain 1F1B over those planned, less one; tells where something is gained on purpose.

    The same operations take as much longer by plain 1F1B as it is busy less.

    unfused_ticks: of all ranks by that, and of those busy. updates_s: of gradients' sums and optimizer, as planned and
    by plain 1F1B, where they are known. is_opposite: whether the plan has opposite replicas. scorers: that it has.
    """
    assert plan.profile is not None
    planned, (total, busy) = evaluate(plan.schedule), unfused_ticks
    step_s = planned.makespan * plan.profile.tick_s
    plain_s = step_s * (1 - planned.bubble_ratio) * total / busy
    planned_update_s, plain_update_s = updates_s
    counted = "not counted"
    if planned_update_s is not None and plain_update_s is not None:
        step_s, plain_s = step_s + planned_update_s, plain_s + plain_update_s
        counted = "included"
    used = ["two opposite replicas"] if is_opposite else []
    used += [f"{', '.join(scorers)} within training"] if scorers else []
    if used:
        _logger.info(
            "%s: a step of %s is planned to take %.3f s, by %splain 1F1B %.3f s, %.2f times as fast (%s)",
            *(" and ".join(used), describe(counts), step_s, "scoring first and " if scorers else ""),
            *(plain_s, plain_s / step_s, f"gradients' sums and optimizer {counted}"),
        )
    return plain_s / step_s - 1


def ticks_unfused(
    profile: Profile, placement: Sequence[Replica], counts: Counts, typical: Shape, unfused: Measured | None
) -> tuple[int, int]:
    """All ranks' together while the models train one after the other, and those of operations.

    typical: micro-batch. unfused: the stages of such training; None where they are those of the placement.
    """
    args = profile, replicas_of(placement, counts), counts, typical
    if unfused is None:
        timing = unfused_timing(*args)
    else:
        replicas = replicas_of(unfused.placement, counts)
        timing = unfused_timing(*args, unfused_replicas=replicas, unfused_profile=unfused.profile)
    return timing.makespan * len(timing.busy_ticks), sum(timing.busy_ticks)
