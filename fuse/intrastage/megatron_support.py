"""What megatron stages can be made of, known without megatron-core."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import PretrainedConfig

from fuse.intrastage.megatron_weights import megatron_name

MODEL_TYPES = ("llama", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3")


def check_supported(config: PretrainedConfig) -> None:
    """Raises: ValueError when a GPTModel of this configuration would compute something else."""
    untyped: Any = config
    if untyped.model_type not in MODEL_TYPES:
        raise ValueError(
            f"model type {untyped.model_type!r}: megatron stages know {', '.join(MODEL_TYPES)}; "
            f"train others with transformers stages"
        )
    sliding = [kind for kind in getattr(untyped, "layer_types", None) or () if kind != "full_attention"]
    problems = {
        "hidden_act": (untyped.hidden_act, untyped.hidden_act == "silu"),
        "layer_types": (sliding[:1], not sliding),
        "attention_bias": (True, untyped.model_type == "qwen2" or not getattr(untyped, "attention_bias", False)),
        "mlp_bias": (True, not getattr(untyped, "mlp_bias", False)),
        "rope_type": (rope_type(config), rope_type(config) in _ROPE_TYPES),
    }
    for name, (value, is_supported) in problems.items():
        if not is_supported:
            raise ValueError(
                f"{name} {value!r} of a {untyped.model_type} model: megatron stages do not compute it; "
                f"train it with transformers stages"
            )


def rope_type(config: PretrainedConfig) -> str:
    parameters = getattr(config, "rope_parameters", None) or {}
    return str(parameters.get("rope_type", "default"))


def check_frozen(names: Collection[str], frozen: Collection[str]) -> None:
    """Raises: ValueError where a matrix is made of parameters of which some are frozen, and others train.

    names: Hugging Face names of the model's parameters. frozen: some of them.
    """
    training = {megatron_name(name): name for name in names if name not in frozen}
    for name in names:
        other = training.get(megatron_name(name))
        if name in frozen and other is not None:
            raise ValueError(
                f"{name} is frozen and {other} is not, and megatron-core keeps both in one matrix: freeze both or "
                "neither, or set train_backend='transformers'"
            )
