"""A stage that takes its time and computes nothing: for schedules of more ranks than there are devices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fuse.micro_batch import MicroBatch
from schedules import Kind


class EmulatedStage:
    """Sleeps as long as each operation takes and passes one number on; see `fuse.intrastage.stage.Stage`.

    seconds: of each kind of operation; without I and W its backward cannot be split.
    oversleep_s: by how much sleeping takes longer than asked, from `measure_oversleep`.
    """

    def __init__(
        self, seconds: Mapping[Kind, float], *, is_first: bool, is_last: bool, oversleep_s: float = 0.0
    ) -> None:
        self._seconds, self._oversleep_s = dict(seconds), oversleep_s
        self._is_first, self._is_last = is_first, is_last
        self._forwarded: set[int] = set()
        self._halved: set[int] = set()

    @property
    def can_split_backward(self) -> bool:
        return Kind.I in self._seconds and Kind.W in self._seconds

    def boundary(self, micro_batch: MicroBatch) -> Tensor:
        return torch.empty(1)

    def forward(self, index: int, micro_batch: MicroBatch, stage_input: Tensor | None) -> Tensor | None:
        assert (stage_input is None) == self._is_first
        assert index not in self._forwarded, f"micro-batch {index} was not finished"
        self._forwarded.add(index)
        self._sleep(Kind.F)
        return None if self._is_last else torch.zeros(1)

    def backward(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        return self._backward(Kind.B, index, output_grad)

    def backward_input(self, index: int, output_grad: Tensor | None) -> Tensor | None:
        self._halved.add(index)
        return self._backward(Kind.I, index, output_grad)

    def backward_weight(self, index: int) -> None:
        self._halved.remove(index)
        self._sleep(Kind.W)

    def _backward(self, kind: Kind, index: int, output_grad: Tensor | None) -> Tensor | None:
        assert (output_grad is None) == self._is_last
        self._forwarded.remove(index)
        self._sleep(kind)
        return None if self._is_first else torch.zeros(1)

    def _sleep(self, kind: Kind) -> None:
        time.sleep(max(0.0, self._seconds[kind] - self._oversleep_s))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())


def measure_oversleep(seconds: float = 5e-3, repeats: int = 20) -> float:
    """By how many seconds `time.sleep` takes longer than asked here, as a median."""
    extra = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        time.sleep(seconds)
        extra.append(time.perf_counter() - start_s - seconds)
    return statistics.median(extra)
