"""One figure per update out of those that losses give of each micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fuse.micro_batch import Metric
from fuse.roles import GENERATING
from fuse.training.steps import StepReport

_WITH_VARIANCE = "val/ratio"


def reduce_metrics(steps: Mapping[str, Sequence[StepReport]], num_places: int | None = None) -> dict[str, float]:
    """Every metric of an update's steps reduced as it says, the variance of `val/ratio`, and mean gradient norms.

    steps: of each role that trained. num_places: see `fuse.training.layout.Layout`.
    """
    reduced: dict[str, float] = {}
    for of_role in steps.values():
        reduced |= _reduced([step.metrics for step in of_role], num_places)
        if of_role[0].auxiliary:
            reduced |= _reduced([step.auxiliary for step in of_role], None)
    norms = {role: float(np.mean([step.gradient_norm for step in of_role])) for role, of_role in steps.items()}
    return reduced | {_norm_name(role, steps): norm for role, norm in norms.items()}


def _norm_name(role: str, steps: Mapping[str, Sequence[StepReport]]) -> str:
    """`grad_norm` of a policy without a critic, as TRL has it; where the critic trains alone it is the critic's."""
    return "grad_norm" if list(steps) == [GENERATING] else f"grad_norm/{role}"


def _reduced(rows: Sequence[Sequence[Mapping[Metric, float]]], num_places: int | None) -> dict[str, float]:
    """rows: [steps][micro-batches]."""
    reduced: dict[str, float] = {}
    divisors: dict[str, str] = {}
    for metric in rows[0][0]:
        counted = rows[0] if metric.first_step else [row for step in rows for row in step]
        values = np.array([row[metric] for row in counted])
        if metric.reduction == "mean" and num_places is not None:
            values = np.pad(values, (0, num_places - len(values)))
        reduced[metric.name] = float(getattr(values, metric.reduction)())
        if metric.per is not None:
            divisors[metric.name] = metric.per
        if metric.name == _WITH_VARIANCE:
            reduced[f"{metric.name}_var"] = float(values.var(ddof=1)) if values.size > 1 else 0.0
    for name, divisor in divisors.items():
        reduced[name] /= max(1.0, reduced[divisor])
    return {name: value for name, value in reduced.items() if name not in divisors.values()}
