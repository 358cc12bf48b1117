"""The weight by which a linear layer computes, whether it has an adapter or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def merged_weight(linear: Any) -> Tensor:
    """Its own, [out, in]; with a LoRA adapter (PEFT's layer around it), W0 + scaling * B A of those that are active.

    Made in float32, and from the W0 that is kept, every time: a sum of updates in a narrower type would lose them.
    """
    weight: Tensor = linear.weight.detach()
    adapters = [name for name in getattr(linear, "active_adapters", ()) if name in linear.lora_A]
    if not adapters or linear.disable_adapters:
        return weight
    merged = weight.float()
    for name in adapters:
        b, a = (one[name].weight.detach().float() for one in (linear.lora_B, linear.lora_A))
        merged = torch.addmm(merged, b, a, alpha=linear.scaling[name])
    return merged
