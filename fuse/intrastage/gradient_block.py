"""Gradients of a model's parameters side by side in one block of host memory, while an update trains.

Made one by one in the first backward they would lie between what micro-batches hold, in holes that nothing else fits
into: an allocator would need half as much again as micro-batches hold at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_ALIGNED = 16
"""Elements, of which every gradient starts at a multiple."""


class GradientBlock:
    """A block for the gradients of parameters that are on one device; where that is no CPU there is none."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._block: Tensor | None = None

    def open(self) -> None:
        """Where no parameter has a gradient, give each one of zeros."""
        if not self._parameters or any(one.device.type != "cpu" or one.grad is not None for one in self._parameters):
            return
        sizes = [-(-one.numel() // _ALIGNED) * _ALIGNED for one in self._parameters]
        self._block = torch.zeros(sum(sizes))
        for parameter, place in zip(self._parameters, self._block.split(sizes), strict=True):
            parameter.grad = place[: parameter.numel()].view_as(parameter)

    def clear(self) -> None:
        """Have no gradients any more: zeros while they are in the block, else none."""
        if self._block is not None:
            self._block.zero_()
            return
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """Let go of the block, and of what gradients are in it."""
        if self._block is not None:
            self._block = None
            self.clear()
