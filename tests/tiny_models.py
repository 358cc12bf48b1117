"""Models of a few thousand weights and tokenizers of a few words: the configurations of all tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from fuse.training.advantage_model import LABELS

_ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXForSequenceClassification),
}

DECODED_BY_MODULES: Mapping[str, Any] = {"mlp_bias": True}
"""Of a Llama that no native call decodes: hundreds of tokens last while a test does something else."""

ModelKind = tuple[type[PreTrainedModel], PreTrainedConfig]
"""What stages are built of."""


def config(architecture: str = "llama", **options: Any) -> Any:
    """Two layers of two heads, one of keys and values, over 16 dimensions and 64 tokens, but for `options`."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    own: dict[str, dict[str, int]] = {
        "llama": {"num_key_value_heads": 1},
        "qwen2": {"num_key_value_heads": 1},
        "qwen3": {"num_key_value_heads": 1, "head_dim": 8},
        "gpt_neox": {},
    }
    return _ARCHITECTURES[architecture][0](**(sizes | own[architecture] | options))


def language_model(architecture: str = "llama", **options: Any) -> ModelKind:
    return _ARCHITECTURES[architecture][1], config(architecture, **options)


def classifier(architecture: str = "llama", **options: Any) -> ModelKind:
    """Of one label."""
    return _ARCHITECTURES[architecture][2], config(architecture, **{"num_labels": 1, **options})


def advantage_model(architecture: str = "llama", **options: Any) -> ModelKind:
    """A classifier with an output for what is expected."""
    return classifier(architecture, num_labels=len(LABELS), id2label=dict(LABELS), **options)


def build(kind: ModelKind, *, seed: int = 0) -> Any:
    """A model as its library initialises it."""
    torch.manual_seed(seed)
    model_class, made = kind
    return model_class(made)


def spread(model: PreTrainedModel, std: float = 0.2, *, generator: torch.Generator | None = None) -> Any:
    """The model, every parameter drawn anew: norms start at 1 and biases at 0, and would hide mistakes in either."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.eval()


def word_tokenizer(
    words: Sequence[str] | Mapping[str, int], *, unknown: str, splits: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """A token per word, or where it `splits` per letter."""
    numbered = words if isinstance(words, Mapping) else {word: index for index, word in enumerate(words)}
    inner = Tokenizer(WordLevel(dict(numbered), unk_token=unknown))
    if splits:
        inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **options)
