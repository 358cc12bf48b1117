"""Which generation engine a run uses, and how a generation worker makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from fuse.engines.engine import GenerationEngine
from fuse.engines.transformers import TransformersEngine
from fuse.engines.vllm import VllmEngine
from fuse.engines.vllm_setup import require_vllm
from fuse.state_dict import adopt_state_dict
from fuse.training.model_spec import ModelSpec
from fuse.workers.weights import WeightsRef, get_state_dict

EngineKind = Literal["transformers", "vllm"]

EngineFactory = Callable[[ModelSpec, Sequence[WeightsRef], str], GenerationEngine]
"""(model, its weights, torch device) -> an engine; runs inside the generation worker."""


def choose_engine(
    kind: EngineKind,
    *,
    max_batch: int,
    max_context: int | None = None,
    num_tokens: int | None = None,
    kv_cache_bytes: int | None = None,
    autocast: torch.dtype | None = None,
) -> EngineFactory:
    """An engine that decodes up to `max_batch` samples at once; it computes in `autocast`'s type, else in float32.

    max_context: the most tokens of prompt and response together; by default what the model's positions allow.
    num_tokens: that a response may consist of, the first of the vocabulary; by default all.
    kv_cache_bytes: of vLLM's cache; the other's grows as needed.

    Raises: ValueError when its package is not installed.
    """
    limits: Mapping[str, Any] = {"max_batch": max_batch, "max_context": max_context, "num_tokens": num_tokens}
    if kind == "vllm":
        require_vllm()
        return partial(vllm_engine, autocast=autocast, limits={**limits, "kv_cache_bytes": kv_cache_bytes})
    return partial(transformers_engine, autocast=autocast, limits=limits)


def transformers_engine(
    spec: ModelSpec,
    weights: Sequence[WeightsRef],
    device: str,
    *,
    autocast: torch.dtype | None,
    limits: Mapping[str, Any],
) -> GenerationEngine:
    """The embedded engine. limits: of `TransformersEngine`."""
    return TransformersEngine(_model(spec, weights, device, autocast), **limits)


def vllm_engine(
    spec: ModelSpec,
    weights: Sequence[WeightsRef],
    device: str,
    *,
    autocast: torch.dtype | None,
    limits: Mapping[str, Any],
) -> GenerationEngine:
    """vLLM in this process. The model that it copies the weights from stays in host memory, and not for long.

    limits: of `VllmEngine`.
    """
    return VllmEngine(_model(spec, weights, "cpu", autocast), device=device, **limits)


def _model(
    spec: ModelSpec, weights: Sequence[WeightsRef], device: str, autocast: torch.dtype | None
) -> PreTrainedModel:
    """It computes as training does, whatever type the caller keeps it in."""
    model = spec.build(torch.device(device), autocast or torch.float32)
    adopt_state_dict(model, get_state_dict(weights))
    return model
