"""What stages of every kind have in common: which layers are theirs, and how these are named, loaded and recomputed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def even_layer_range(num_layers: int, stage: int, num_stages: int) -> tuple[int, int]:
    """Layers [start, stop) of a stage when layers are spread as evenly as they go, the surplus on late stages."""
    return num_layers * stage // num_stages, num_layers * (stage + 1) // num_stages


def checked_layer_range(
    model: str,
    num_layers: int,
    layer_range: tuple[int, int] | None,
    *,
    stage: int,
    num_stages: int,
    min_layers: int = 0,
) -> tuple[int, int]:
    """The layers [start, stop) of a stage: those asked for, or an even share.

    model: for errors.

    Raises: ValueError when there is no such stage, or its layers are too few or outside the model.
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} of {num_stages}: stages count from 0 to num_stages - 1")
    start, stop = layer_range or even_layer_range(num_layers, stage, num_stages)
    if not 0 <= start <= start + min_layers <= stop <= num_layers:
        raise ValueError(
            f"layer range {(start, stop)} of {model}: must lie within its {num_layers} layers and have at least "
            f"{min_layers} of them: choose another, or fewer stages"
        )
    return start, stop


def global_name(name: str, layers_prefix: str, first_layer: int) -> str:
    """The whole model's name of a parameter of a stage that numbers its layers, from `first_layer` on, from 0."""
    if not name.startswith(layers_prefix):
        return name
    layer, _, rest = name.removeprefix(layers_prefix).partition(".")
    return f"{layers_prefix}{int(layer) + first_layer}.{rest}"


def check_state_dict(state_dict: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], what: str) -> None:
    """Raises: ValueError when the state dict misses a tensor of `shapes`, or has it in another shape."""
    problems = [
        f"{name} is missing"
        if name not in state_dict
        else f"{name} is {list(state_dict[name].shape)}, the model has {list(shape)}"
        for name, shape in shapes.items()
        if name not in state_dict or state_dict[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"state dict does not fit {what}: {'; '.join(problems[:3])}{more}: "
            f"load weights of the same architecture and configuration"
        )


def recompute_in_backward(layers: Iterable[nn.Module]) -> None:
    """Let the layers keep nothing but their input from forward to backward."""
    for layer in layers:
        untyped: Any = layer
        untyped.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
