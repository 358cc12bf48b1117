"""Tiny random models, built from config: no download, and spread-out logits, so that greedy text is not constant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def build(
    architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False
) -> PreTrainedModel:
    """97 tokens, 256 positions; grouped-query attention, but for GPT-NeoX."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
    }
    model: PreTrainedModel
    match architecture:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2))
        case "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=1, head_dim=16))
        case "gpt_neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
