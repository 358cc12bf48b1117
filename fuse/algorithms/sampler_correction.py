"""Importance weights for samples of an engine that does not compute what the trainer computes.

Source: truncated and masked importance sampling as in TRL's GRPOTrainer (trl 1.12), after Yao et al. 2025 ("Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training") and IcePop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fuse.algorithms.sequences import Sequences
from fuse.micro_batch import Metric

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectionSettings:
    """mode: whether ratios are of tokens or sequences, and whether those out of bounds are clipped or set to zero."""

    mode: CorrectionMode
    least: float | None
    most: float | None


def correction_ratios(differences: Tensor, sequences: Sequences, settings: CorrectionSettings) -> Tensor:
    """Ratios of the trainer's probabilities to the sampler's, bounded, [tokens]; without gradient.

    differences: of their log-probabilities, [tokens].
    """
    with torch.no_grad():
        if settings.mode.startswith("sequence"):
            differences = sequences.expand(sequences.sum(differences))
        ratios = differences.exp()
        if settings.mode.endswith("truncate"):
            return ratios.clamp(settings.least, settings.most)
        is_out = torch.zeros_like(ratios, dtype=torch.bool)
        if settings.least is not None:
            is_out |= ratios < settings.least
        if settings.most is not None:
            is_out |= ratios > settings.most
        return ratios.masked_fill(is_out, 0.0)


def correction_metrics(ratios: Tensor) -> dict[Metric, Tensor]:
    """Of the ratios of a micro-batch, [tokens]."""
    known = ratios if len(ratios) else ratios.new_ones(1)
    return {
        Metric("sampling/importance_sampling_ratio/min", "min"): known.min(),
        Metric("sampling/importance_sampling_ratio/mean"): known.mean(),
        Metric("sampling/importance_sampling_ratio/max", "max"): known.max(),
    }
