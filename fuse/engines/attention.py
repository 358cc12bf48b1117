"""Attention of a decode step over the slots, in place of the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuse.ops.decode_attention import additive_mask, decode_attention, masked_attention

SLOT_ATTENTION = "fuse_slots"

# Arguments that some models pass and that change nothing here. Any other one is left to the model's sdpa path.
_HARMLESS = frozenset({"position_ids", "use_cache", "sliding_window", "is_causal"})


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function in the sense of transformers, fast for one token per row.

    Shapes: query [rows, heads, tokens, head_dim], key and value [rows, kv_heads, context, head_dim]; the result is
    [rows, tokens, heads, head_dim]. `attention_mask` is what `decode_mask` made, or None for a causal prefill. Where it
    names slots, keys and values are those of all slots, [slots, kv_heads, context, head_dim].
    """
    if query.shape[2] > 1 or attention_mask is None or not kwargs.keys() <= _HARMLESS:
        if attention_mask is not None and not attention_mask.is_floating_point():
            lengths, slots = _lengths_and_slots(attention_mask)
            key, value = (key, value) if slots is None else (key[slots], value[slots])
            attention_mask = additive_mask(lengths, key.shape[2], query.dtype)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if attention_mask.is_floating_point():
        output = masked_attention(query[:, :, 0], key, value, attention_mask, scale)
    else:
        lengths, slots = _lengths_and_slots(attention_mask)
        output = decode_attention(query[:, :, 0], key, value, lengths, scale, slots)
    return output.unsqueeze(1), None


def _lengths_and_slots(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """What `decode_mask` made of lengths, int64 [rows, 1, 1, 1], or of lengths and slots, [rows, 1, 1, 2]."""
    return mask[:, 0, 0, 0], mask[:, 0, 0, 1] if mask.shape[3] == 2 else None


def use_slot_attention(model: PreTrainedModel) -> bool:
    """Make a model that uses sdpa call `slot_attention`; returns whether it does.

    A model with attention of its own keeps it.
    """
    if not model._supports_attention_backend or model.config._attn_implementation not in ("sdpa", SLOT_ATTENTION):
        return False
    ALL_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_attention)
    model.set_attn_implementation(SLOT_ATTENTION)
    return True


def decode_mask(lengths: Tensor, context: int, dtype: torch.dtype, *, native: bool, slots: Tensor | None) -> Tensor:
    """The `attention_mask` of a decode step over rows of lengths int64 [rows]: four-dimensional, so models pass it on.

    Where native code does the attention it is the lengths themselves, int64 [rows, 1, 1, 1], with the rows' slots
    [rows, 1, 1, 2] where they are not in order; elsewhere an additive mask [rows, 1, 1, context], built once for all
    layers.
    """
    if not native:
        return additive_mask(lengths, context, dtype)
    return (lengths.unsqueeze(1) if slots is None else torch.stack((lengths, slots), dim=1))[:, None, None]
