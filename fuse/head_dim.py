"""What configurations of models say of attention heads, or leave to be derived."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


def head_dim(config: PretrainedConfig) -> int:
    """Numbers of a head, of the text model's configuration."""
    untyped: Any = config
    return int(getattr(untyped, "head_dim", None) or untyped.hidden_size // untyped.num_attention_heads)
