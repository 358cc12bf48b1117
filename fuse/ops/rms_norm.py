"""Root-mean-square normalisation with one pass forward and one backward, and little kept between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse.ops.native import call, choose, described, log_choice

NATIVE_DTYPES = (torch.float32,)


def rms_norm(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * inputs / sqrt(mean(inputs^2) + epsilon), the mean over the last dimension; differentiable once.

    inputs: [..., width], normalised in float32 and rounded to their type; weight: [width]. Keeps the inputs, and a
    number for each of their rows.
    """
    apply: Any = _RMSNorm.apply
    output: Tensor = apply(inputs, weight, epsilon)
    return output


def rms_norm_reference(inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`rms_norm` as the definition has it."""
    wide = inputs.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(inputs.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        native, choice = _native(inputs, weight)
        log_choice("rms_norm", choice)
        inputs = inputs.contiguous()
        if native is None:
            wide = inputs.float()
            factors = torch.rsqrt(wide.pow(2).mean(-1) + epsilon)
            output = weight * (wide * factors.unsqueeze(-1)).to(inputs.dtype)
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
        native, _ = _native(inputs, weight)
        if native is None:
            return *_gradients(inputs, weight, factors.unsqueeze(-1), output_grad), None
        input_grad, weight_grad = torch.empty_like(inputs), torch.empty_like(weight)
        rows, grads = (one.view(-1, inputs.shape[-1]) for one in (inputs, output_grad.contiguous()))
        kept = rows, weight.detach(), factors.view(-1)
        call(native.rms_norm_backward, *kept, grads, input_grad.view(rows.shape), weight_grad)
        return input_grad, weight_grad, None


def _native(inputs: Tensor, weight: Tensor) -> tuple[Any, str]:
    if inputs.dtype is not weight.dtype:
        return None, "torch reference: inputs and weight are of two types"
    return choose(inputs.device, inputs.dtype, NATIVE_DTYPES)


def _gradients(inputs: Tensor, weight: Tensor, factors: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    normed = inputs.float() * factors
    weight_grad = (output_grad * normed.to(inputs.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
    grad = (output_grad * weight).to(inputs.dtype).float()
    along = (grad * normed).mean(-1, keepdim=True)
    return grad.sub_(normed.mul_(along)).mul_(factors).to(inputs.dtype), weight_grad


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described("native C++ for float32 on CPU", "torch elsewhere")


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose(example.device, example.dtype, NATIVE_DTYPES)[1]
