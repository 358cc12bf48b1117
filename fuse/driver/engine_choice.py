"""Which generation engine a run uses, and how a generation worker makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuse.engines.engine import GenerationEngine
from fuse.engines.lockstep import Follower, Group, Leader
from fuse.engines.speculation import SpeculationKind
from fuse.engines.transformers import TransformersEngine
from fuse.engines.vllm import VllmEngine, follow
from fuse.engines.vllm_setup import require_vllm
from fuse.state_dict import adopt_state_dict
from fuse.training.model_spec import ModelSpec
from fuse.workers.engine_follower import NextWeights
from fuse.workers.weights import WeightsRef, get_state_dict

EngineKind = Literal["transformers", "vllm"]


class EngineFactory(Protocol):
    """Makes an engine inside the generation worker."""

    def __call__(
        self, spec: ModelSpec, weights: Sequence[WeightsRef], device: str, group: Group | None = None
    ) -> GenerationEngine:
        """Of a model with these weights, on a torch device; with others where it is the first process of a group."""
        ...

    def follow(self, spec: ModelSpec, device: str, follower: Follower, next_weights: NextWeights) -> None:
        """Be another process of such a group, inside an `EngineFollower`, until the engine is closed.

        next_weights: gives the weights to begin with, and then those that are loaded.
        """
        ...


def choose_engine(
    kind: EngineKind,
    *,
    max_batch: int,
    max_context: int | None = None,
    num_tokens: int | None = None,
    kv_cache_bytes: int | None = None,
    captures_decode: bool = False,
    speculation: SpeculationKind = "off",
    autocast: torch.dtype | None = None,
) -> EngineFactory:
    """An engine that decodes up to `max_batch` samples at once; it computes in `autocast`'s type, else in float32.

    max_context: the most tokens of prompt and response together; by default what the model's positions allow.
    num_tokens: that a response may consist of, the first of the vocabulary; by default all.
    kv_cache_bytes: of vLLM's cache; the other's grows as needed. captures_decode, speculation: of the other,
    by CUDA graphs and by drafts.

    Raises: ValueError when its package is not installed.
    """
    limits: Mapping[str, Any] = {"max_batch": max_batch, "max_context": max_context, "num_tokens": num_tokens}
    if kind == "vllm":
        require_vllm()
        return VllmFactory(autocast, {**limits, "kv_cache_bytes": kv_cache_bytes})
    return TransformersFactory(autocast, {**limits, "captures_decode": captures_decode, "speculation": speculation})


@dataclass(frozen=True, slots=True)
class TransformersFactory:
    """Of the embedded engine. limits: of `TransformersEngine`."""

    autocast: torch.dtype | None
    limits: Mapping[str, Any]

    def __call__(
        self, spec: ModelSpec, weights: Sequence[WeightsRef], device: str, group: Group | None = None
    ) -> GenerationEngine:
        assert group is None, "its matrices are whole"
        return TransformersEngine(_model(spec, weights, device, self.autocast), frozen=spec.frozen, **self.limits)

    def follow(self, *_: object) -> None:
        raise AssertionError("its matrices are whole")


@dataclass(frozen=True, slots=True)
class VllmFactory:
    """Of vLLM in this process. The model that it copies the weights from stays in host memory, and not for long.

    limits: of `VllmEngine`.
    """

    autocast: torch.dtype | None
    limits: Mapping[str, Any]

    def __call__(
        self, spec: ModelSpec, weights: Sequence[WeightsRef], device: str, group: Group | None = None
    ) -> GenerationEngine:
        leader = None if group is None else Leader(group)
        model = _model(spec, weights, "cpu", self.autocast)
        return VllmEngine(model, device=device, leader=leader, **self.limits)

    def follow(self, spec: ModelSpec, device: str, follower: Follower, next_weights: NextWeights) -> None:
        def make_model() -> PreTrainedModel:
            return _model_with(spec, dict(next_weights()), "cpu", self.autocast)

        follow(follower, make_model, next_weights, device=device, **self.limits)


def _model(
    spec: ModelSpec, weights: Sequence[WeightsRef], device: str, autocast: torch.dtype | None
) -> PreTrainedModel:
    return _model_with(spec, get_state_dict(weights), device, autocast)


def _model_with(
    spec: ModelSpec, state_dict: Mapping[str, Tensor], device: str, autocast: torch.dtype | None
) -> PreTrainedModel:
    """It computes as training does, whatever type the caller keeps it in."""
    model = spec.build(torch.device(device), autocast or torch.float32)
    adopt_state_dict(model, state_dict)
    return model
