"""Steps of Llamas' layers between matrix products, in one pass each, in place of the several of transformers' modules.

What these compute is the same to rounding. They keep less for the backward: a normalisation keeps its input and a
number a row, rotary embeddings nothing but angles, and the product of gate and up projection is made anew in the
backward. That is nearly half of what a layer keeps, and costs no matrix product.

Normalisations and feed-forward layers are known by what they compute, instruction for instruction, which is Llama's in
most models; attention by its class.
"""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from fuse.intrastage.split_backward import WeightGradient
from fuse.ops.rms_norm import rms_norm
from fuse.ops.rotary import rotary
from fuse.ops.swiglu import swiglu, swiglu_backward, swiglu_forward

if TYPE_CHECKING:
    from fuse.intrastage.split_backward import SplitBackward

_ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
_ROTARY = "apply_rotary_pos_emb"
"""What transformers calls it, in every model's own module."""


def use_fused_layers(model: nn.Module, split: SplitBackward | None = None) -> None:
    """Have a model's modules of these kinds compute so; weights and names stay theirs.

    split: takes over the gradients of linear layers' weights.
    """
    for module in model.modules():
        untyped: Any = module
        if _computes_as(module, LlamaRMSNorm):
            untyped.forward = partial(_norm, module)
        elif _computes_as(module, LlamaMLP) and isinstance(untyped.act_fn, nn.SiLU | type(ACT2FN["silu"])):
            untyped.forward = partial(_mlp, module, split)
        elif type(module) in _ATTENTIONS:
            untyped.forward = MethodType(_attention(untyped.forward.__func__), module)


def has_known_layers(model: PreTrainedModel) -> bool:
    """Whether all of a model's attention is of these classes, and to whatever comes before."""
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [
        "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    ]
    attentions = [module for module in model.modules() if type(module) in _ATTENTIONS]
    return len(attentions) == config.num_hidden_layers and {*kinds} == {"full_attention"}


def _computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    return _instructions(type(module)) == _instructions(known)


def _instructions(module_class: type[nn.Module]) -> tuple[object, ...] | None:
    """Of its forward, without the docstring; None where it is not Python."""
    code = getattr(module_class.forward, "__code__", None)
    return None if code is None else (code.co_code, code.co_names, code.co_consts[1:])


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    return rms_norm(hidden, norm.weight, norm.variance_epsilon)


def _mlp(mlp: Any, split: SplitBackward | None, hidden: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    down: Any = mlp.down_proj
    apply: Any = _GatedDown.apply
    is_split = split is not None and type(down) is nn.Linear
    output: Tensor = apply(gate, up, down.weight, down.bias, split) if is_split else down(swiglu(gate, up))
    return output


class _GatedDown(torch.autograd.Function):
    """down(silu(gate) * up): the product that the projection reads is not kept."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, split: SplitBackward
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.split = weight, bias, split
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up, weight)
        product = swiglu_forward(gate, up)
        return functional.linear(product, weight.to(gate.dtype), None if bias is None else bias.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        if any(ctx.needs_input_grad[2:4]):
            gradient = WeightGradient(ctx.weight, ctx.bias, swiglu_forward(gate, up), output_grad)
            if not ctx.split.defer(gradient):
                gradient.add()
        product_grad = output_grad.matmul(weight.to(output_grad.dtype))
        return *swiglu_backward(gate, up, product_grad), None, None, None


@cache
def _attention(forward: Any) -> Any:
    """A forward that finds another rotary embedding under the name; everybody else's stays what it is."""
    if _ROTARY not in forward.__code__.co_names:
        return forward
    names = {**forward.__globals__, _ROTARY: partial(_rotated, forward.__globals__[_ROTARY])}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


def _rotated(otherwise: Any, query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    is_single = query.dtype is torch.float32 and not torch.is_autocast_enabled(query.device.type)
    if not (is_single and cosines.dtype is query.dtype is key.dtype):
        rotated: tuple[Tensor, Tensor] = otherwise(query, key, cosines, sines)
        return rotated
    return rotary(query, cosines, sines), rotary(key, cosines, sines)
