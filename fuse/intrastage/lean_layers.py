"""Parts of decoder layers that keep less for their backward: what is cheap is computed again in place of being held.

Of a token a Llama layer keeps its inputs to matrix products, and besides what lies between them. A normalisation here
keeps its input and one number a row, not the normalised row; the product of gate and up projection is made anew in the
backward, where its gradient is made. That is nearly half of what a layer keeps, and costs no matrix product.

Only modules are replaced whose forward is Llama's, instruction for instruction, as that of most models is.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from fuse.intrastage.split_backward import WeightGradient

if TYPE_CHECKING:
    from fuse.intrastage.split_backward import SplitBackward


def keep_less(model: nn.Module, split: SplitBackward | None) -> None:
    """Have the model's normalisations and, where `split` takes over its linear layers, its gated MLPs keep less."""
    for module in model.modules():
        untyped: Any = module
        if _computes_as(module, LlamaRMSNorm):
            untyped.forward = functools.partial(_normalised, module)
        elif split is not None and _computes_as(module, LlamaMLP) and _is_plain(untyped):
            untyped.forward = functools.partial(_gated, module, split)


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    return _instructions(type(module)) == _instructions(known)


def _instructions(module_class: type[nn.Module]) -> tuple[object, ...] | None:
    """Of its forward, without the docstring; None where it is not Python."""
    code = getattr(module_class.forward, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts[1:])


def _is_plain(mlp: Any) -> bool:
    return isinstance(mlp.act_fn, nn.SiLU | type(ACT2FN["silu"])) and type(mlp.down_proj) is nn.Linear


def _normalised(norm: Any, hidden: Tensor) -> Tensor:
    apply: Any = _RMSNorm.apply
    normalised: Tensor = apply(hidden, norm.weight, norm.variance_epsilon)
    return normalised


def _gated(mlp: Any, split: SplitBackward, layer_input: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(layer_input), mlp.up_proj(layer_input)
    apply: Any = _GatedDown.apply
    down: Tensor = apply(gate, up, mlp.down_proj.weight, mlp.down_proj.bias, split)
    return down


class _RMSNorm(torch.autograd.Function):
    """weight * hidden / rms(hidden), with the norm in float32, as transformers has it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        wide = hidden.float() * scale
        hidden_grad = weight_grad = None
        if ctx.needs_input_grad[1]:
            rows = output_grad * wide.to(hidden.dtype)
            weight_grad = rows.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            of_wide = (output_grad * weight).to(hidden.dtype).float()
            mean = (of_wide * wide).mean(-1, keepdim=True)
            hidden_grad = of_wide.sub_(wide.mul_(mean)).mul_(scale).to(hidden.dtype)
        return hidden_grad, weight_grad, None


class _GatedDown(torch.autograd.Function):
    """down(silu(gate) * up): the product that the projection reads is not kept."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, split: SplitBackward
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.split = weight, bias, split
        ctx.save_for_backward(gate, up, weight)
        product = functional.silu(gate) * up
        return functional.linear(product, weight.to(gate.dtype), None if bias is None else bias.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        activated = functional.silu(gate)
        if any(ctx.needs_input_grad[2:4]):
            gradient = WeightGradient(ctx.weight, ctx.bias, activated * up, output_grad)
            if not ctx.split.defer(gradient):
                gradient.add()
        product_grad = output_grad.matmul(weight.to(output_grad.dtype))
        gate_grad = torch.ops.aten.silu_backward(product_grad * up, gate)
        return gate_grad, product_grad.mul_(activated), None, None, None
