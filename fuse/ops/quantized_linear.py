"""Linear layers with weights of 8 or 4 bits, for a few rows: what takes time is reading weights, and these are fewer.

Weights [outs, width] become two tensors, to be read by native code: values, and what these stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from fuse.ops.native import choose, current, described, log_choice, queue

NATIVE_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}

INT4_GROUP = 32
"""Neighbours in a row that have a minimum and a scale of their own."""

_ROWS_AT_A_TIME = 4096
"""Of a matrix, while it is quantized: its float copies stay small."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [outs, width] as int8 of the same shape, and what a unit of each output stands for, float32 [outs].

    To nearest, symmetric, per output channel: no weight is off by more than half a unit.
    """
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    for first in range(0, len(weight), _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        part = weight[rows].detach().float()
        scales[rows] = part.abs().amax(dim=1) / 127
        quantized[rows] = (part / scales[rows].clamp(min=1e-30).unsqueeze(1)).round_()
    return quantized, scales


def quantize_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [outs, width] as uint8 [outs, groups, 16], and groups' minimum and scale as bfloat16 [outs, groups, 2].

    To nearest, 16 equal steps from the least to the largest of each `INT4_GROUP`: no weight is off by more than half a
    step, and what rounding to bfloat16 does to the ends. The last group of a row is filled up with zeros. Byte j has a
    group's element j in its lower half and j + 16 in its upper one.
    """
    missing = -weight.shape[1] % INT4_GROUP
    num_groups = (weight.shape[1] + missing) // INT4_GROUP
    quantized = torch.empty(len(weight), num_groups, INT4_GROUP // 2, dtype=torch.uint8, device=weight.device)
    ranges = torch.empty(len(weight), num_groups, 2, dtype=torch.bfloat16, device=weight.device)
    for first in range(0, len(weight), _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        groups = functional.pad(weight[rows].detach().float(), (0, missing)).unflatten(1, (num_groups, INT4_GROUP))
        least, largest = groups.aminmax(dim=2)
        ranges[rows, :, 0] = least
        ranges[rows, :, 1] = (largest - ranges[rows, :, 0]) / 15
        minimum, scale = ranges[rows].float().unsqueeze(3).unbind(2)
        steps = ((groups - minimum) / scale.clamp(min=1e-30)).round_().clamp_(0, 15).to(torch.uint8)
        low, high = steps.chunk(2, dim=2)
        quantized[rows] = low | high << 4
    return quantized, ranges


def int8_linear(inputs: Tensor, quantized: Tensor, scales: Tensor) -> Tensor:
    """inputs . (scales * quantized)^T, [..., outs], in the inputs' dtype.

    inputs: [..., width], floating. quantized, scales: what `quantize_int8` made. The C++ code rounds inputs to 16 bits
    of their row's largest, which changes products by about 1e-5 of theirs; the CUDA code takes them as they are, and
    reads the weights once for every eight rows. It has run on emulated warps only, and on no GPU yet.
    """
    assert inputs.shape[-1] == quantized.shape[1], f"{list(inputs.shape)} . {list(quantized.shape)}^T"
    return _product("int8_linear", int8_linear_reference, inputs, quantized, scales)


def int4_linear(inputs: Tensor, quantized: Tensor, ranges: Tensor) -> Tensor:
    """`int8_linear` with what `quantize_int4` made."""
    assert -(-inputs.shape[-1] // INT4_GROUP) == quantized.shape[1], f"{list(inputs.shape)}, {list(quantized.shape)}"
    return _product("int4_linear", int4_linear_reference, inputs, quantized, ranges)


def int8_linear_reference(inputs: Tensor, quantized: Tensor, scales: Tensor) -> Tensor:
    """`int8_linear` by the matrix that the weights stand for."""
    return functional.linear(inputs, (quantized * scales.unsqueeze(1)).to(inputs.dtype))


def int4_linear_reference(inputs: Tensor, quantized: Tensor, ranges: Tensor) -> Tensor:
    """`int4_linear` by the matrix that the weights stand for."""
    steps = torch.cat((quantized & 15, quantized >> 4), dim=2)
    minimum, scale = ranges.float().unsqueeze(3).unbind(2)
    weight = (scale * steps + minimum).flatten(1)[:, : inputs.shape[-1]]
    return functional.linear(inputs, weight.to(inputs.dtype))


@dataclass(frozen=True, slots=True)
class Quantization:
    """A kind of weights: what makes them of a matrix [outs, width], and what multiplies inputs [..., width] by them."""

    quantize: Callable[[Tensor], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor], Tensor]


INT8 = Quantization(quantize_int8, int8_linear)
INT4 = Quantization(quantize_int4, int4_linear)


def choose_for(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """The native code if it serves inputs of this type and device, and in words what serves."""
    return choose(device, dtype, NATIVE_DTYPES.get(device.type, ()), has_cuda=True)


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described(
        "native C++ for float32 on CPU",
        "torch, by whole matrices, elsewhere",
        on_gpus="CUDA for float32 and bfloat16 on GPUs",
    )


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose_for(example.device, example.dtype)[1]


def _product(
    name: str, reference: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Tensor, values: Tensor, scales: Tensor
) -> Tensor:
    """By the native function of this name where it serves."""
    native, choice = choose_for(inputs.device, inputs.dtype)
    log_choice(name, choice)
    if native is None:
        return reference(inputs, values, scales)
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    output = rows.new_empty(len(rows), len(values))
    with current(inputs.device):
        getattr(native, name)(rows, values, scales, output, *queue(inputs.device))
    return output.view(*inputs.shape[:-1], len(values))
