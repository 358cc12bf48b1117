"""Steps of Llamas' layers between matrix products, in one pass each, in place of the several of transformers' modules.

What these compute is the same to rounding. They keep less for the backward: of a normalisation its input alone, of the
feed-forward layer two tensors of its width in place of three, of rotary embeddings nothing but angles.
"""

from __future__ import annotations

from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from fuse.ops.rms_norm import rms_norm
from fuse.ops.rotary import rotary
from fuse.ops.swiglu import swiglu

_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP)
_ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
_ROTARY = "apply_rotary_pos_emb"
"""What transformers calls it, in every model's own module."""


def use_fused_layers(model: nn.Module) -> None:
    """Have a model's modules of these classes compute so where they compute in fp32; weights and names stay theirs."""
    for module in model.modules():
        untyped: Any = module
        if type(module) in _NORMS:
            untyped.forward = partial(_norm, module)
        elif type(module) in _MLPS and untyped.config.hidden_act == "silu":
            untyped.forward = partial(_mlp, module)
        elif type(module) in _ATTENTIONS:
            untyped.forward = MethodType(_attention(untyped.forward.__func__), module)


def has_known_layers(model: PreTrainedModel) -> bool:
    """Whether all of a model's layers are of these classes, and attend to whatever comes before."""
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [
        "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    ]
    attentions = [module for module in model.modules() if type(module) in _ATTENTIONS]
    return len(attentions) == config.num_hidden_layers and {*kinds} == {"full_attention"}


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    if not (_is_single(hidden) and norm.weight.dtype is hidden.dtype):
        output: Tensor = type(norm).forward(norm, hidden)
        return output
    return rms_norm(hidden, norm.weight, norm.variance_epsilon)


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    output: Tensor = mlp.down_proj(swiglu(gate, up) if _is_single(gate) else mlp.act_fn(gate) * up)
    return output


@cache
def _attention(forward: Any) -> Any:
    """A forward that finds another rotary embedding under the name; everybody else's stays what it is."""
    if _ROTARY not in forward.__code__.co_names:
        return forward
    names = {**forward.__globals__, _ROTARY: partial(_rotated, forward.__globals__[_ROTARY])}
    return FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)


def _rotated(otherwise: Any, query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    if not (_is_single(query) and cosines.dtype is query.dtype is key.dtype):
        rotated: tuple[Tensor, Tensor] = otherwise(query, key, cosines, sines)
        return rotated
    return rotary(query, cosines, sines), rotary(key, cosines, sines)


def _is_single(values: Tensor) -> bool:
    return values.dtype is torch.float32 and not torch.is_autocast_enabled(values.device.type)
