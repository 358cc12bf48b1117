"""Linear layers with weights of 8 bits, for a few rows: what takes time is reading weights, and these are a quarter."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fuse.ops.native import choose, current, described, log_choice, queue

NATIVE_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}

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


def int8_linear(inputs: Tensor, quantized: Tensor, scales: Tensor) -> Tensor:
    """inputs . (scales * quantized)^T, [..., outs], in the inputs' dtype.

    inputs: [..., width], floating. quantized, scales: what `quantize_int8` made. The C++ code rounds inputs to 16 bits
    of their row's largest, which changes products by about 1e-5 of theirs; the CUDA code takes them as they are, and
    reads the weights once for every eight rows. It has run on emulated warps only, and on no GPU yet.
    """
    device = inputs.device
    native, choice = choose_for(device, inputs.dtype)
    log_choice("int8_linear", choice)
    if native is None:
        return int8_linear_reference(inputs, quantized, scales)
    assert inputs.shape[-1] == quantized.shape[1], f"{list(inputs.shape)} . {list(quantized.shape)}^T"
    rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    output = rows.new_empty(len(rows), len(quantized))
    with current(device):
        native.int8_linear(rows, quantized, scales, output, *queue(device))
    return output.view(*inputs.shape[:-1], len(quantized))


def choose_for(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType | None, str]:
    """The native code if it serves inputs of this type and device, and in words what serves."""
    return choose(device, dtype, NATIVE_DTYPES.get(device.type, ()), has_cuda=True)


def int8_linear_reference(inputs: Tensor, quantized: Tensor, scales: Tensor) -> Tensor:
    """`int8_linear` by the matrix that the weights stand for."""
    weight = (quantized * scales.unsqueeze(1)).to(inputs.dtype)
    return torch.nn.functional.linear(inputs, weight)


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
