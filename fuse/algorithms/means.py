"""Means over the positions that count, or in their place sums with the weights of regrouped micro-batches."""

from __future__ import annotations

from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of `values` where `mask` is true; zero where it is nowhere true, as for a micro-batch of empty responses.

    weights: of a `RowWeights`, to be summed with instead.
    """
    if weights is not None:
        return (values * mask * weights).sum()
    return (values * mask).sum() / mask.sum().clamp(min=1)


def mean(values: Tensor, *, of_none: float = 0.0) -> Tensor:
    """Mean of all `values`; `of_none` where there are none, as of a micro-batch of empty responses."""
    return values.mean() if values.numel() else values.new_tensor(of_none)
