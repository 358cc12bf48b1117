"""Random Llamas, whose weights do not matter: lengths are forced, and what is timed is the same with any."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fuse.commands.models import load_policy


def llama_config(*, context: int, num_layers: int = 4, hidden_size: int = 256, **options: Any) -> LlamaConfig:
    """Of four heads; context: tokens of the longest sample. options: further ones of `LlamaConfig`."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": context}
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 43 // 16,
        num_hidden_layers=num_layers,
        **(shape | options),
    )


def random_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def causal_model(path: str | None, *, context: int, vocab_size: int, kv_heads: int) -> PreTrainedModel:
    """The model at a path in fp32, or a random Llama."""
    if path is None:
        return random_llama(
            llama_config(context=max(1024, context), vocab_size=vocab_size, num_key_value_heads=kv_heads)
        )
    model = load_policy(path)
    model.eval()
    return model
