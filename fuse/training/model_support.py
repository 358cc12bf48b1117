"""Which models can be trained, known before there is a stage of them."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from fuse.intrastage.adapters import Adapters
from fuse.intrastage.megatron_support import check_frozen, check_supported
from fuse.intrastage.transformers_stage import check_stages


def check_trainable(model: PreTrainedModel, backend: Literal["transformers", "megatron"]) -> None:
    """Raises: ValueError for a model of which stages of this kind cannot be made, or that has nothing to train."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters = Adapters.of(model)
    if not any(flags.values()):
        remedy = "load its adapter with is_trainable=True" if adapters else "call requires_grad_(True) on some"
        raise ValueError(f"no parameter of the {type(model).__name__} to train requires gradients: {remedy}")
    check_stages(model)
    if backend == "megatron" and adapters:
        raise ValueError("train_backend='megatron' trains no adapters: leave it out, or train all weights")
    if backend == "megatron":
        check_supported(model.config)
        check_frozen(flags, [name for name, requires_grad in flags.items() if not requires_grad])
