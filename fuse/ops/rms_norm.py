"""Root-mean-square normalisation with one pass forward and one backward, and little kept between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse.ops.native import call, choose, extension, log_choice

NATIVE_DTYPES = (torch.float32,)


def rms_norm(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * inputs / sqrt(mean(inputs^2) + epsilon), the mean over the last dimension; differentiable once.

    inputs: [..., width], weight [width], of one type. Keeps the inputs, and a number for each of their rows.
    """
    apply: Any = _RMSNorm.apply
    output: Tensor = apply(inputs, weight, epsilon)
    return output


def rms_norm_reference(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` as the definition has it."""
    return weight * (inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + epsilon))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        native, choice = choose(inputs.device, inputs.dtype, NATIVE_DTYPES)
        log_choice("rms_norm", choice)
        inputs = inputs.contiguous()
        if native is None:
            factors = torch.rsqrt(inputs.pow(2).mean(-1) + epsilon)
            output = weight * (inputs * factors.unsqueeze(-1))
        else:
            output, factors = torch.empty_like(inputs), inputs.new_empty(inputs.shape[:-1])
            rows = inputs.detach().view(-1, inputs.shape[-1])
            call(native.rms_norm, rows, weight.detach(), epsilon, output.view(rows.shape), factors.view(-1))
        ctx.save_for_backward(inputs, weight, factors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, factors = ctx.saved_tensors
        native, _ = choose(inputs.device, inputs.dtype, NATIVE_DTYPES)
        width = inputs.shape[-1]
        if native is None:
            normed, grad = inputs * factors.unsqueeze(-1), output_grad * weight
            along = (grad * normed).mean(-1, keepdim=True)
            input_grad = (grad - normed * along) * factors.unsqueeze(-1)
            weight_grad = (output_grad * normed).reshape(-1, width).sum(0)
        else:
            input_grad, weight_grad = torch.empty_like(inputs), torch.empty_like(weight)
            rows, grads = inputs.view(-1, width), output_grad.contiguous().view(-1, width)
            kept = rows, weight.detach(), factors.view(-1)
            call(native.rms_norm_backward, *kept, grads, input_grad.view(rows.shape), weight_grad)
        return input_grad, weight_grad, None


def describe() -> str:
    """Which implementation serves which input, and why."""
    native, reason = extension()
    if native is None:
        return f"torch reference: {reason}"
    return "native C++ for float32 on CPU; torch elsewhere"


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose(example.device, example.dtype, NATIVE_DTYPES)[1]
