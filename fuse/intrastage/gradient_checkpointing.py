"""Gradient checkpointing: layers that keep their input alone, and run again in the backward."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(layers: Iterable[nn.Module]) -> None:
    """Let the layers keep nothing but their input from forward to backward."""
    for layer in layers:
        untyped: Any = layer
        untyped.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
