"""Sums over the responses of a micro-batch, whose tokens lie end to end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Sequences:
    """Which response each token belongs to. rows: int64 [tokens]. count: responses, those without tokens included."""

    rows: Tensor
    count: int

    @classmethod
    def of(cls, micro_batch: MicroBatch) -> Sequences:
        """Of a micro-batch that is padded on the right, whose head sees the tokens that count."""
        count, width = micro_batch.input_ids.shape
        return cls(micro_batch.head_index // width, count)

    def sum(self, values: Tensor) -> Tensor:
        """[tokens] -> [responses]."""
        return values.new_zeros(self.count).index_add(0, self.rows, values)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each, int64 [responses]."""
        return torch.bincount(self.rows, minlength=self.count)

    def mean(self, values: Tensor) -> Tensor:
        """[tokens] -> [responses]; zero of one without tokens."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def expand(self, values: Tensor) -> Tensor:
        """[responses] -> [tokens]."""
        return values[self.rows]
