"""What a stage remembers of its micro-batches: graphs from forward to backward, weight gradients from I to W."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.intrastage.split_backward import SplitBackward, WeightGradient, add_all


@dataclass(frozen=True, slots=True)
class _Forwarded:
    stage_input: Tensor | None
    output: Tensor


class InFlight:
    """A stage's micro-batches by index, and their backwards, as `fuse.intrastage.stage.Stage` has them.

    split: what the stage's linear layers defer to; None when backwards cannot be split.
    """

    def __init__(self, split: SplitBackward | None) -> None:
        self.split = split
        self._forwarded: dict[int, _Forwarded] = {}
        self._weight_gradients: dict[int, deque[WeightGradient]] = {}

    def add(self, index: int, stage_input: Tensor | None, output: Tensor) -> None:
        """Remember a forward: what came into the stage, and the hidden states or the loss that it made."""
        assert index not in self._forwarded, f"micro-batch {index} was not finished"
        self._forwarded[index] = _Forwarded(stage_input, output)

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        forwarded = self._forwarded.pop(index)
        if forwarded.output.requires_grad:  # not at the bottom of a model that is frozen there
            torch.autograd.backward(forwarded.output, output_grad)
        return None if forwarded.stage_input is None else forwarded.stage_input.grad

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        assert self.split is not None, "the stage was built without split_backward"
        assert index not in self._weight_gradients, f"the weight gradients of micro-batch {index} are outstanding"
        with self.split.deferred() as gradients:
            input_grad = self.backward(index, output_grad)
        self._weight_gradients[index] = gradients
        return input_grad

    def backward_weight(self, index: int) -> None:
        add_all(self._weight_gradients.pop(index))
