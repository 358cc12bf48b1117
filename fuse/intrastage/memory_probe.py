"""A stage that counts the bytes one of its micro-batches holds, while training runs it as it always does."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.stage import Stage
from fuse.micro_batch import MicroBatch


class MemoryProbe:
    """Runs `stage` as it is, and counts the bytes that its micro-batch `index` holds.

    activation_bytes: held from F to B or I, with what the previous stage sent.
    weight_grad_bytes: held from I to W, with what the next stage sent; 0 for a whole backward.
    """

    def __init__(self, stage: Stage, index: int) -> None:
        self._stage, self._index = stage, index
        self._live = LiveMemory()
        self.activation_bytes = self.weight_grad_bytes = 0

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        return self._stage.boundary(micro_batch)

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        if index != self._index:
            return self._stage.forward(index, micro_batch, stage_input)
        with self._live:
            output = self._stage.forward(index, micro_batch, stage_input)
        self.activation_bytes = self._live.bytes + _size(stage_input)
        return output

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        return self._stage.backward(index, output_grad)

    @property
    def can_split_backward(self) -> bool:
        return self._stage.can_split_backward

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        if index != self._index:
            return self._stage.backward_input(index, output_grad)
        with self._live:
            input_grad = self._stage.backward_input(index, output_grad)
        self.weight_grad_bytes = self._live.bytes - _size(input_grad) + _size(output_grad)
        return input_grad

    def backward_weight(self, index: int) -> None:
        self._stage.backward_weight(index)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._stage.named_parameters()


def _size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
