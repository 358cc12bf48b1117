"""The model of a decoder with matrices of fewer bits: what drafts by it computes with.

A precision is an entry of `PRECISIONS`; all else serves each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.engines.decoder import Decoder
from fuse.engines.draft import Expected
from fuse.engines.native_llama import Matrices, NativeLlama, is_served
from fuse.merged_weight import merged_weight
from fuse.ops.quantized_linear import INT4, INT8, Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Of a model's matrices; function: of the native extension, which decodes with these; expected: of such drafts."""

    layers: Quantization
    head: Quantization
    function: str
    expected: Expected


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {
        "int8": Precision(
            layers=INT8, head=INT8, function="int8_decode", expected=Expected(step_share=0.3, chance=0.95)
        ),
        # Logits feel a head of 4 bits as much as they feel all layers, and in large models it is little of the weights.
        "int4": Precision(
            layers=INT4, head=INT8, function="int4_decode", expected=Expected(step_share=0.2, chance=0.75)
        ),
    }
)
"""By name of the engine's `speculation`."""


def quantized(target: Decoder, precision: Precision) -> Decoder | NativeLlama:
    """The target in this precision over its own cache, in one native call where there is code for such models."""
    if not is_served(target.model):
        return target.of(quantized_copy(target.model, precision))
    layers, head = (partial(QuantizedMatrix, kind) for kind in (precision.layers, precision.head))
    return NativeLlama(target.model, target.cache, target.num_tokens, Matrices(layers, head, precision.function))


def quantized_copy(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """The model with such linear layers, its head included; all but their matrices is the model's own."""
    kept = [model.config, *chain(model.parameters(), model.buffers())]
    copied: PreTrainedModel = copy.deepcopy(model, {id(one): one for one in kept})
    head = copied.get_output_embeddings()
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) or hasattr(child, "lora_A"):
                setattr(module, name, QuantizedLinear(precision.head if child is head else precision.layers, child))
    return copied


class QuantizedMatrix:
    """Linear layers that take the same inputs, as one, for native code. num_outs: the first of them."""

    def __init__(self, kind: Quantization, linears: Sequence[nn.Linear], num_outs: int | None = None) -> None:
        parts = [kind.quantize(merged_weight(linear)[:num_outs]) for linear in linears]
        self._weights = [torch.cat(each) if len(each) > 1 else each[0] for each in zip(*parts, strict=True)]
        biases = [linear.bias for linear in linears]
        self._bias = None if any(bias is None for bias in biases) else torch.cat([bias.detach() for bias in biases])

    def addresses(self) -> list[int]:
        return [*(one.data_ptr() for one in self._weights), 0 if self._bias is None else self._bias.data_ptr()]

    @property
    def num_outs(self) -> int:
        return len(self._weights[0])


class QuantizedLinear(nn.Module):
    """In place of a linear layer and the adapter on it, without its gradient."""

    def __init__(self, kind: Quantization, linear: Any) -> None:
        super().__init__()
        self._kind = kind
        self._weights = kind.quantize(merged_weight(linear))
        self._bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        output = self._kind.linear(inputs, *self._weights)
        return output if self._bias is None else output + self._bias
