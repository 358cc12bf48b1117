"""A model without its weights, and how to build it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """How to build a model without its weights."""

    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSpec:
        return cls(model_class=type(model), config=model.config, dtype=model.dtype)

    @property
    def num_layers(self) -> int:
        num_layers: int = self.config.get_text_config().num_hidden_layers
        return num_layers

    def build(self, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The whole model in evaluation mode, its parameters yet to be loaded; `dtype` in place of its own."""
        with no_init_weights():
            model: Any = self.model_class(copy.deepcopy(self.config))
        built: PreTrainedModel = model.to(device=device, dtype=dtype or self.dtype).eval().requires_grad_(False)
        return built
