"""Means over the positions that count."""

from __future__ import annotations

from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; zero where it is nowhere true, as for a micro-batch of empty responses."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
