"""Linear layers over a few rows on a CPU core: what takes time is reading weights, once for all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.ops.native import choose, described, log_choice

NATIVE_DTYPES = (torch.float32,)
ROWS = range(1, 10)
"""Of which native code is at least as fast wherever it was tried; of more, torch is faster where there is AVX-512."""


def skinny_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs . weight^T + bias, [..., outs]; inputs [..., width], weight [outs, width], bias [outs].

    By native code for a few rows in float32 on one CPU core where no gradient is asked for; else by torch.
    """
    num_rows = inputs.numel() // max(1, inputs.shape[-1])
    has_gradient = torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad)
    if num_rows not in ROWS or has_gradient or torch.get_num_threads() > 1 or not weight.is_contiguous():
        return skinny_linear_reference(inputs, weight, bias)
    native, choice = choose(inputs.device, inputs.dtype, NATIVE_DTYPES)
    log_choice("skinny_linear", choice)
    if native is None or weight.dtype is not inputs.dtype:
        return skinny_linear_reference(inputs, weight, bias)
    assert inputs.shape[-1] == weight.shape[1], f"{list(inputs.shape)} . {list(weight.shape)}^T"
    rows = inputs.reshape(num_rows, -1).contiguous()
    output = rows.new_empty(num_rows, len(weight))
    native.skinny_linear(rows, weight.detach(), output)
    if bias is not None:
        output += bias
    return output.view(*inputs.shape[:-1], len(weight))


def skinny_linear_reference(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`skinny_linear` by torch."""
    return torch.nn.functional.linear(inputs, weight, bias)


def describe() -> str:
    """Which implementation serves which input, and why."""
    rows = f"{ROWS[0]} to {ROWS[-1]} rows"
    return described(f"native C++ for {rows} in float32 on one CPU core, without gradients", "torch elsewhere")


def implementation(example: Tensor) -> str:
    """Which implementation serves so few inputs of the dtype and device of `example`."""
    return choose(example.device, example.dtype, NATIVE_DTYPES)[1]
