"""What a run's memory depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from fuse.driver.model_size import ModelSize
from fuse.driver.stage_bytes import ModelBytes
from fuse.driver.stage_probe import model_bytes
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.placement import Counts, Replica
from fuse.training.model_spec import ModelSpec

Scoring = Literal["whole", "sharded"]
SCORING_CHOICES: Mapping[str, tuple[Scoring, ...]] = MappingProxyType(
    {"auto": ("whole", "sharded"), "whole": ("whole",), "sharded": ("sharded",)}
)
"""By what users ask for, what is tried, the first that fits."""


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model of a run, without weights. bytes: what its stages take."""

    spec: ModelSpec
    size: ModelSize
    bytes: ModelBytes

    def weight_bytes(self, parameters: int, trained: int, autocast: torch.dtype | None) -> int:
        """Of a stage: what trains is float32, and so is the rest, unless it is in the type of the computation."""
        return 4 * trained + self.frozen_dtype(autocast).itemsize * (parameters - trained)

    def frozen_dtype(self, autocast: torch.dtype | None) -> torch.dtype:
        """Of what does not train of a stage, but for vectors, which are few."""
        narrow: torch.dtype | None = self.spec.stage_options(autocast)["frozen_dtype"]
        return narrow or torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySetup:
    """All of a run that its memory depends on.

    models: by role. placement: as of `FleetSettings`. device_memory_bytes: of each device.
    tensor_parallel_size: devices that share each stage, as of `TrainingSettings`.
    is_fused: replicas that share devices, as those of actor and critic do, train at once and split backwards.
    prompt_tokens, response_tokens: of the longest. micro_batch_size: sequences. num_micro_batches: at once.
    generation_dtype: of engines. engine_devices: that share one engine's weights and cache by tensor
        parallelism.
    scoring: every device has a whole copy of each model that scores, or each has a share: reference and reward by
        layers, while the critic is scored through the stages that train.
    engines_sleep: engines drop weights and cache during training.
    offloads_training: what trains lies in host memory but during training, save weights that score where they train.
    averaged: roles of which the stages that train keep an average, too.
    text: the largest micro-batch of text that the actor trains on, where there is any.
    recomputes_logprobs: the stages that train compute the actor's log-probabilities before an update.
    """

    models: Mapping[str, PlannedModel]
    placement: tuple[Replica, ...]
    num_devices: int
    device_memory_bytes: int
    accelerator: Literal["cpu", "cuda"]
    prompt_tokens: int
    response_tokens: int
    micro_batch_size: int
    num_micro_batches: Counts
    autocast: torch.dtype | None
    generation_dtype: torch.dtype
    engine_batch_size: int
    inference_batch_size: int
    inference_batch_tokens: int
    is_fused: bool = True
    tensor_parallel_size: int = 1
    engine: Literal["transformers", "vllm"] = "transformers"
    generation_cache_bytes: int | None = None
    engine_devices: int = 1
    scoring: Scoring = "whole"
    engines_sleep: bool = False
    offloads_training: bool = False
    recomputes_logprobs: bool = False
    averaged: frozenset[str] = frozenset()
    text: Shape | None = None

    @property
    def longest(self) -> Shape:
        """The largest micro-batch there can be."""
        return larger(Shape(self.micro_batch_size, self.prompt_tokens + self.response_tokens), self.text)


def larger(one: Shape, other: Shape | None) -> Shape:
    """Of two, the one with more tokens."""
    return one if other is None else max(one, other, key=lambda shape: shape.size)


def planned_models(
    specs: Mapping[str, ModelSpec],
    *,
    autocast: torch.dtype | None,
    gradient_checkpointing: bool,
    split_backward: bool,
    device: str = "cuda",
) -> dict[str, PlannedModel]:
    """Count and measure the models of a run, by role; takes seconds. The options are those of `model_bytes`.

    Raises:
        ValueError: a model whose layers cannot be measured without weights.
    """
    planned = {}
    for role, spec in specs.items():
        size = ModelSize.of(spec)
        bytes_ = model_bytes(
            spec,
            size.head_shape,
            autocast=autocast,
            gradient_checkpointing=gradient_checkpointing,
            split_backward=split_backward,
            device=device,
        )
        planned[role] = PlannedModel(spec, size, bytes_)
    return planned
