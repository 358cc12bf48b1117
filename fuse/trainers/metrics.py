"""One figure per update out of those that losses give of each micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fuse.micro_batch import Metric

_WITH_VARIANCE = "val/ratio"


def reduce_metrics(rows: Sequence[Sequence[Mapping[Metric, float]]], num_places: int | None = None) -> dict[str, float]:
    """Every metric reduced as it says, and the variance of `val/ratio`. rows: [steps][micro-batches].

    num_places: see `fuse.training.layout.Layout`.
    """
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
