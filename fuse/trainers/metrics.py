"""One figure per update out of those that losses give of each micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fuse.micro_batch import Metric
from fuse.training.steps import StepReport

_WITH_VARIANCE = "val/ratio"


def reduce_metrics(steps: Sequence[StepReport], num_places: int | None = None) -> dict[str, float]:
    """Every metric of an update's steps reduced as it says, the variance of `val/ratio`, and mean gradient norms.

    num_places: see `fuse.training.layout.Layout`.
    """
    norms = {role: float(np.mean([step.gradient_norms[role] for step in steps])) for role in steps[0].gradient_norms}
    named = {"grad_norm" if len(norms) == 1 else f"grad_norm/{role}": norm for role, norm in norms.items()}
    return {**_reduced([step.metrics for step in steps], num_places), **named}


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
