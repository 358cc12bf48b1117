"""How long responses were, by the names that TRL's GRPOTrainer (trl 1.12) has for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fuse.sample import Sample


def length_metrics(samples: Sequence[Sample], ended: Tensor) -> dict[str, float]:
    """Of all responses, and of those that ended by themselves: ended, bool [samples]."""
    lengths = torch.tensor([float(sample.length) for sample in samples])
    terminated = lengths[ended] if bool(ended.any()) else torch.zeros(1)
    return {
        **{f"completions/{name}_length": value for name, value in _spread(lengths).items()},
        "completions/clipped_ratio": float((~ended).float().mean()),
        **{f"completions/{name}_terminated_length": value for name, value in _spread(terminated).items()},
    }


def _spread(values: Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "min": float(values.min()), "max": float(values.max())}
