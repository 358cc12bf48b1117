"""An engine of one model, outside of any run."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fuse.engines.engine import SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.trainers.special_tokens import end_tokens


def lone_device() -> torch.device:
    """The accelerator where there is one; a build of torch for accelerators has none by itself."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def lone_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    **limits: Any,
) -> tuple[TransformersEngine, SamplingParams]:
    """On the accelerator where there is one, and how to sample until the model ends. limits: of the engine."""
    device: Any = lone_device()
    params = SamplingParams(
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        stop_token_ids=end_tokens(tokenizer, model),
    )
    return TransformersEngine(model.to(device), **limits), params
