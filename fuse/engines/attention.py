"""Attention of a decode step over the slots, in place of the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SLOT_ATTENTION = "fuse_slots"

# Arguments that some models pass and that change nothing here. Any other one (sinks, soft caps, biases) is
# left to the model's sdpa path, which knows or refuses it.
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
    """Scaled dot-product attention that never copies the keys of grouped-query models.

    Shapes: query [rows, heads, tokens, head_dim], key and value [rows, kv_heads, context, head_dim], attention_mask
    additive [rows, 1, 1, context]; the result is [rows, tokens, heads, head_dim].

    With one token per row, the heads that share a key head are as good as tokens that share it: the groups become the
    query axis. The stock path repeats every key and value instead: ten times slower at a context of 512.
    """
    rows, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    if tokens > 1 or attention_mask is None or not kwargs.keys() <= _HARMLESS:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(rows, 1, heads, value.shape[-1]), None


def use_slot_attention(model: PreTrainedModel) -> None:
    """Make a model that uses sdpa call `slot_attention`; a model with attention of its own keeps it."""
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        ALL_ATTENTION_FUNCTIONS.register(SLOT_ATTENTION, slot_attention)
        model.set_attn_implementation(SLOT_ATTENTION)
