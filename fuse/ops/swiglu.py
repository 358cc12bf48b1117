"""The gate of a Llama's feed-forward layer, with one pass forward and one backward, and nothing kept but its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fuse.ops.native import call, choose, described, log_choice

NATIVE_DTYPES = (torch.float32,)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and type; differentiable once."""
    apply: Any = _SwiGLU.apply
    output: Tensor = apply(gate, up)
    return output


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` as the definition has it."""
    return functional.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(gate, up, output_grad)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` of contiguous tensors, not to be differentiated."""
    native, choice = choose(gate.device, gate.dtype, NATIVE_DTYPES)
    log_choice("swiglu", choice)
    if native is None:
        return swiglu_reference(gate, up)
    output = torch.empty_like(gate)
    call(native.swiglu, gate.detach().view(-1), up.detach().view(-1), output.view(-1))
    return output


def swiglu_backward(gate: Tensor, up: Tensor, output_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, contiguous, from that of `swiglu`'s result."""
    native, _ = choose(gate.device, gate.dtype, NATIVE_DTYPES)
    if native is None:
        return torch.ops.aten.silu_backward(output_grad * up, gate), output_grad * functional.silu(gate)
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    grads = output_grad.contiguous()
    call(native.swiglu_backward, *(one.view(-1) for one in (gate, up, grads, gate_grad, up_grad)))
    return gate_grad, up_grad


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described("native C++ for float32 on CPU", "torch elsewhere")


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose(example.device, example.dtype, NATIVE_DTYPES)[1]
