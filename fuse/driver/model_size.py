"""How many parameters a model has and where, from its configuration alone: it is built without memory and counted."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from fuse.head_dim import head_dim
from fuse.intrastage.layer_range import even_layer_range
from fuse.intrastage.placement import Replica
from fuse.intrastage.transformers_stage import head_of
from fuse.training.model_spec import ModelSpec, Origin

_T = TypeVar("_T")
FrozenSizes = tuple[tuple[Origin, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Parameters of a model's parts.

    tensors: of the embedding, of each layer, and of what comes after the layers without `tied`, the size of each.
    embedding: of the input. layers: of each. head: of what comes after the layers, without `tied`.
    tied: those of the head that are the embedding's tensor, of which a last stage holds a copy of its own.
    largest: of the largest tensor. kv_values: keys and values of a token, all layers, of `kv_heads` heads in each.
    head_shape: outputs, inputs.
    trained_tensors: like `tensors`, of what trains. origins: like `tensors`, of what nobody changes.
    """

    tensors: tuple[tuple[int, ...], ...]
    trained_tensors: tuple[tuple[int, ...], ...]
    origins: tuple[tuple[Origin | None, ...], ...]
    embedding: int
    layers: tuple[int, ...]
    head: int
    tied: int
    largest: int
    kv_values: int
    kv_heads: int
    head_shape: tuple[int, int]

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelSize:
        """Count the parameters of `spec`'s model; takes about a second for 80 layers, and no memory."""
        model = without_weights(spec)
        layers = _layers(model, spec.num_layers)
        first = _tensors(model.get_input_embeddings())
        in_layers = [_tensors(layer) for layer in layers]
        known = {id(one) for part in (first, *in_layers) for one in part}
        last = [one for one in model.parameters() if id(one) not in known]
        frozen = {id(one) for name, one in model.named_parameters() if name in spec.frozen}
        parts = (first, *in_layers, last)
        tensors = tuple(tuple(one.numel() for one in part) for part in parts)
        origins = {id(one): spec.origins.get(name) for name, one in model.named_parameters()}
        embedding, *per_layer, rest = map(sum, tensors)
        head: Any = head_of(model)
        is_tied = head.weight is model.get_input_embeddings().weight
        return cls(
            tensors=tensors,
            trained_tensors=tuple(tuple(one.numel() for one in part if id(one) not in frozen) for part in parts),
            origins=tuple(tuple(origins[id(one)] for one in part) for part in parts),
            embedding=embedding,
            layers=tuple(per_layer),
            head=rest,
            tied=embedding if is_tied else 0,
            largest=max(parameter.numel() for parameter in model.parameters()),
            kv_values=kv_values(spec.config),
            kv_heads=kv_heads(spec.config),
            head_shape=(head.weight.shape[0], head.weight.shape[1]),
        )

    @property
    def trained(self) -> float:
        """Share of the parameters that train."""
        return sum(map(sum, self.trained_tensors)) / self.total

    @property
    def total(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return self.embedding + sum(self.layers) + self.head

    def stage(self, stage: int, num_stages: int, layer_range: tuple[int, int] | None = None) -> int:
        """Parameters that a stage holds; layers are spread evenly by default."""
        return sum(self.stage_tensors(stage, num_stages, layer_range))

    def stage_tensors(
        self, stage: int, num_stages: int, layer_range: tuple[int, int] | None = None, *, trained: bool = False
    ) -> tuple[int, ...]:
        """The size of each of a stage's parameters. trained: of those that train."""
        return self._of_stage(self.trained_tensors if trained else self.tensors, stage, num_stages, layer_range)

    def _of_stage(
        self,
        parts: tuple[tuple[_T, ...], ...],
        stage: int,
        num_stages: int,
        layer_range: tuple[int, int] | None,
    ) -> tuple[_T, ...]:
        """Those of a stage. parts: like `tensors`."""
        start, stop = layer_range or even_layer_range(len(self.layers), stage, num_stages)
        held = [*parts[: stage == 0], *parts[1 + start : 1 + stop]]
        if stage == num_stages - 1:
            held.append(parts[-1])
            if num_stages > 1 and self.tied:
                held.append(parts[0])
        return tuple(itertools.chain(*held))

    def frozen(self, stage: int, num_stages: int, layer_range: tuple[int, int] | None = None) -> FrozenSizes:
        """Of a stage, the size of each parameter that nobody changes, and whose it is."""
        sizes = self.stage_tensors(stage, num_stages, layer_range)
        origins = self._of_stage(self.origins, stage, num_stages, layer_range)
        return tuple((origin, size) for origin, size in zip(origins, sizes, strict=True) if origin is not None)

    def frozen_of(self, replica: Replica, stage: int) -> FrozenSizes:
        """`frozen` of a replica's stage."""
        layer_range = None if replica.layer_ranges is None else replica.layer_ranges[stage]
        return self.frozen(stage, len(replica.ranks), layer_range)

    def stages(self, replica: Replica) -> tuple[int, ...]:
        """Parameters of every stage of a replica."""
        return tuple(map(sum, self.tensors_of(replica)))

    def tensors_of(self, replica: Replica, *, trained: bool = False) -> tuple[tuple[int, ...], ...]:
        """The size of each parameter of every stage of a replica. trained: of those that train."""
        count = len(replica.ranks)
        ranges: Sequence[tuple[int, int] | None] = replica.layer_ranges or (None,) * count
        return tuple(self.stage_tensors(stage, count, ranges[stage], trained=trained) for stage in range(count))


def kv_values(config: Any) -> int:
    """Numbers that keys and values of one token are, over all layers."""
    text = config.get_text_config()
    return 2 * int(text.num_hidden_layers) * kv_heads(config) * head_dim(text)


def kv_heads(config: Any) -> int:
    """Heads of keys and values in a layer."""
    text = config.get_text_config()
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def without_weights(spec: ModelSpec) -> PreTrainedModel:
    """The model with its adapters on the meta device."""
    config = copy.deepcopy(spec.config)
    config.dtype = torch.float32
    with torch.device("meta"), no_init_weights():
        model = spec.model_class(config)
    model.tie_weights()
    spec.adapters.inject(model)
    return model


def _layers(model: PreTrainedModel, count: int) -> nn.ModuleList:
    """The model's layers. A model that keeps them elsewhere cannot be cut, and counts as one piece."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return nn.ModuleList()


def _tensors(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters())
