"""Where a model can be cut into stages, as it declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Names of the base model's children: what comes before its layers, the layers, what comes after."""

    before: tuple[str, ...]
    layers: str
    after: tuple[str, ...]


def pipeline_plan(model: PreTrainedModel) -> PipelinePlan:
    """Raises: ValueError for a model that declares none."""
    base: Any = model.base_model
    names = tuple(base.config.base_model_pp_plan or ())
    layers = [name for name in names if isinstance(getattr(base, name, None), nn.ModuleList)]
    if len(layers) != 1:
        raise ValueError(
            f"{type(model).__name__} declares no pipeline plan (base_model_pp_plan), so it cannot be split into "
            f"stages: use an architecture that does, such as Llama, Qwen2, Qwen3, Mistral or GPT-NeoX"
        )
    position = names.index(layers[0])
    return PipelinePlan(names[:position], layers[0], names[position + 1 :])
