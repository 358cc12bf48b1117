"""What checks run on: a device, shapes that suit it, and random models of them; and what a check tells."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config

from fuse.commands.known_models import config_of, spec_of
from fuse.training.model_spec import ModelSpec

DeviceType = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table. ok: None for what could not be checked, which `detail` gives the reason of."""

    name: str
    measured: str = ""
    bound: str = ""
    ok: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """device: its type. model: of the policy and, but for the head, of all others. dtype: of whatever does not train.

    prompt_tokens, response_tokens: of every sample. batch_size: samples of an update. decode_rows: batches that decode.
    decode_steps: timed of each. sync_limit_s: for new weights to reach an engine; None for no limit.
    small: kernels run on few numbers, as under a sanitizer.
    """

    device: DeviceType
    model: PretrainedConfig
    dtype: torch.dtype
    prompt_tokens: int
    response_tokens: int
    batch_size: int
    decode_rows: tuple[int, ...]
    decode_steps: int
    sync_limit_s: float | None
    small: bool

    @property
    def context(self) -> BaseContext:
        """How processes start: CUDA has to be new to each, while forks on a CPU need not import all anew."""
        return multiprocessing.get_context("spawn" if self.device == "cuda" else "fork")


def setup_of(device: DeviceType) -> Setup:
    """A 1.5-billion-parameter model for GPUs, and one of a few thousand for CPUs."""
    if device == "cuda":
        return Setup(
            device=device,
            model=config_of("qwen2.5-1.5b"),
            dtype=torch.bfloat16,
            prompt_tokens=512,
            response_tokens=512,
            batch_size=8,
            decode_rows=(8, 64),
            decode_steps=48,
            sync_limit_s=0.3,
            small=False,
        )
    tiny = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=96,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    return Setup(
        device=device,
        model=tiny,
        dtype=torch.bfloat16,
        prompt_tokens=5,
        response_tokens=6,
        batch_size=4,
        decode_rows=(2,),
        decode_steps=3,
        sync_limit_s=None,
        small=True,
    )


def spec_for(setup: Setup, role: str, dtype: torch.dtype) -> ModelSpec:
    """The model of a role, of parameters of this type."""
    return spec_of(setup.model, scores=role in ("critic", "reward"), dtype=dtype)


def random_model(setup: Setup, role: str, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights every time, of which those of another role or type differ by its rounding or head alone."""
    device = torch.device(setup.device)
    model = spec_for(setup, role, dtype).build(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                drawn = torch.empty(parameter.shape, device=device).normal_(0.0, 0.02, generator=generator)
                parameter.copy_(drawn)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def synchronize(setup: Setup) -> None:
    """Wait for the device."""
    if setup.device == "cuda":
        torch.cuda.synchronize()


def gigabytes(num_bytes: float) -> str:
    """With as many digits as a tiny model needs."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e7 else f"{num_bytes / 1e3:.1f} kB"
