"""GRPO: responses to one prompt compared with one another, and no critic.

Source: Shao et al. 2024 (arXiv 2402.03300).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.group_advantages import Aggregation, Scale, group_advantages
from fuse.algorithms.group_batch import GroupSettings, GroupTargets, Scored, estimate
from fuse.algorithms.grpo_loss import GRPOLossSettings, grpo_loss
from fuse.sample import SpecialTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOSettings:
    """group: what is compared. scale, aggregation: of advantages, see `group_advantages`."""

    group: GroupSettings
    scale: Scale
    aggregation: Aggregation
    loss: GRPOLossSettings


def grpo(settings: GRPOSettings, special: SpecialTokens) -> Algorithm:
    """GRPO with these settings, on responses that these tokens end."""
    group = settings.group

    def advantages_of(scored: Scored) -> tuple[Tensor, Tensor]:
        return group_advantages(
            scored.rewards,
            torch.tensor(group.reward_weights),
            num_generations=group.num_generations,
            scale=settings.scale,
            aggregation=settings.aggregation,
        )

    return Algorithm(
        estimate=partial(estimate, settings=group, advantages_of=advantages_of, special=special),
        losses={"actor": partial(grpo_loss, settings=settings.loss)},
        targets={"actor": GroupTargets},
    )
