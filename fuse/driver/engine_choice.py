"""Which generation engine a run uses, and how a generation worker makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch

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
    kind: EngineKind, *, max_batch: int, kv_cache_bytes: int | None, autocast: torch.dtype | None
) -> EngineFactory:
    """An engine that decodes up to `max_batch` samples at once; it computes in `autocast`'s type where there is one.

    kv_cache_bytes: of vLLM's cache; the other's grows as needed.

    Raises: ValueError when its package is not installed.
    """
    if kind == "vllm":
        require_vllm()
        return partial(vllm_engine, max_batch=max_batch, kv_cache_bytes=kv_cache_bytes, autocast=autocast)
    return partial(transformers_engine, max_batch=max_batch, autocast=autocast)


def transformers_engine(
    spec: ModelSpec, weights: Sequence[WeightsRef], device: str, *, max_batch: int, autocast: torch.dtype | None
) -> GenerationEngine:
    """The embedded engine."""
    model = spec.build(torch.device(device), autocast)
    adopt_state_dict(model, get_state_dict(weights))
    return TransformersEngine(model, max_batch=max_batch)


def vllm_engine(
    spec: ModelSpec,
    weights: Sequence[WeightsRef],
    device: str,
    *,
    max_batch: int,
    kv_cache_bytes: int | None,
    autocast: torch.dtype | None,
) -> GenerationEngine:
    """vLLM in this process. The model that it copies the weights from stays in host memory, and not for long."""
    model = spec.build(torch.device("cpu"), autocast)
    adopt_state_dict(model, get_state_dict(weights))
    return VllmEngine(model, device=device, max_batch=max_batch, kv_cache_bytes=kv_cache_bytes)
