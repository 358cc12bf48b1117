"""Where a sample's KV lies while it is on its way: tensors one after the other in one piece of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layout = Sequence[tuple[torch.dtype, Sequence[int]]]
"""Dtype and shape of each tensor in turn. Each starts at the next multiple of its element size."""

Allocate = Callable[[int], Tensor]
"""Number of bytes -> memory, uint8 [bytes], contiguous, on the engine's device, aligned for every dtype."""


def layout_of(tensors: Sequence[Tensor]) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


def num_bytes(layout: Layout) -> int:
    """What the tensors need together."""
    return _spans(layout)[-1][1] if layout else 0


def views(memory: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """The tensors that lie in `memory`, uint8 [bytes]."""
    return tuple(
        memory[start:end].view(dtype).view(tuple(shape))
        for (start, end), (dtype, shape) in zip(_spans(layout), layout, strict=True)
    )


def _spans(layout: Layout) -> list[tuple[int, int]]:
    """First byte of each tensor, and the one behind its last."""
    spans, end = [], 0
    for dtype, shape in layout:
        start = -(-end // dtype.itemsize) * dtype.itemsize
        end = start + math.prod(shape) * dtype.itemsize
        spans.append((start, end))
    return spans
