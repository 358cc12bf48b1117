"""Shapes of common models by name, as their published configurations have them, and models by path."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from fuse.commands.model_path import check_model_path
from fuse.training.model_spec import ModelSpec

# hidden size, layers, heads, heads of keys and values, intermediate size, vocabulary, whether embeddings are tied
_QWEN2 = MappingProxyType(
    {
        "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
        "qwen2.5-3b": (2048, 36, 16, 2, 11008, 151936, True),
        "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
        "qwen2.5-32b": (5120, 64, 40, 8, 27648, 152064, False),
        "qwen2.5-72b": (8192, 80, 64, 8, 29568, 152064, False),
    }
)
_LLAMA = MappingProxyType(
    {
        "llama3-8b": (4096, 32, 32, 8, 14336, 128256, False),
        "llama3-70b": (8192, 80, 64, 8, 28672, 128256, False),
    }
)
_POSITIONS = MappingProxyType({"qwen2": 32768, "llama": 8192})
KNOWN = (*_QWEN2, *_LLAMA)


def config_of(model: str) -> PretrainedConfig:
    """The configuration of a known name, of a directory or file, or of a name on the Hugging Face Hub.

    Raises:
        ValueError: there is none.
    """
    if model in KNOWN:
        return _known(model)
    if not Path(model).is_file():
        check_model_path(model)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"no model at {model} ({reason}): give a path, or one of {', '.join(KNOWN)}") from error
    return config


def spec_of(config: PretrainedConfig, *, scores: bool, dtype: torch.dtype) -> ModelSpec:
    """A language model of this configuration, or one that scores by a head of one output.

    Raises:
        ValueError: transformers has no model of that kind.
    """
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    config = copy.deepcopy(config)
    if scores:
        config.num_labels = 1
        config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    model_class = auto._model_mapping.get(type(config), None)
    if model_class is None:
        kind = "sequence classifier" if scores else "causal language model"
        raise ValueError(f"transformers has no {kind} of type {config.model_type}: plan with another architecture")
    return ModelSpec(model_class=model_class, config=config, dtype=dtype)


def _known(name: str) -> PretrainedConfig:
    kind: Any = Qwen2Config if name in _QWEN2 else LlamaConfig
    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = (_QWEN2 | _LLAMA)[name]
    config: PretrainedConfig = kind(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=_POSITIONS[kind.model_type],
    )
    return config
