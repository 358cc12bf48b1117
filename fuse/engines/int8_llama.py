"""A Llama with int8 matrices over the slots of its target, run by native code in one call per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from fuse.engines.native_llama import Matrix, NativeLlama
from fuse.merged_weight import merged_weight
from fuse.ops.int8_linear import quantize_int8


class Int8Matrix:
    """Linear layers that take the same inputs, as one with int8 weights."""

    def __init__(self, linears: Sequence[nn.Linear], num_outs: int | None = None) -> None:
        parts = [quantize_int8(merged_weight(linear)[:num_outs]) for linear in linears]
        self._quantized, self._scales = (
            torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)
        )
        biases = [linear.bias for linear in linears]
        self._bias = None if any(bias is None for bias in biases) else torch.cat([bias.detach() for bias in biases])

    def addresses(self) -> list[int]:
        return [self._quantized.data_ptr(), self._scales.data_ptr(), 0 if self._bias is None else self._bias.data_ptr()]

    @property
    def num_outs(self) -> int:
        return len(self._quantized)


class Int8Llama(NativeLlama):
    """What a `Decoder` of `quantized_copy(model)` computes, but for rounding."""

    matrix: ClassVar[type[Matrix]] = Int8Matrix
    function: ClassVar[str] = "int8_decode"
