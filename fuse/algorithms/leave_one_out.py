"""Advantages over the mean of a prompt's other responses.

Source: RLOO, Ahmadian et al. 2024 (arXiv 2402.14740), section 3.3; normalised as in TRL's RLOOTrainer (trl 1.12).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.algorithms.group_advantages import deviation
from fuse.algorithms.groups import by_group

_EPSILON = 1e-4


def leave_one_out(rewards: Tensor, *, num_generations: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Advantages [samples], and the deviation [samples] of each one's group.

    rewards: [samples], those of a prompt's `num_generations` responses side by side; NaN is no reward: its advantage is
    0, and it is not compared with.
    """
    grouped = by_group(rewards, num_generations)
    others = grouped.isfinite().sum(dim=1, keepdim=True) - 1
    baselines = (grouped.nansum(dim=1, keepdim=True) - grouped) / others
    advantages = torch.where(others > 0, grouped - baselines, torch.nan).reshape(-1)
    if normalize:
        advantages = (advantages - advantages.nanmean()) / (deviation(advantages, dim=0) + _EPSILON)
    return advantages.nan_to_num(nan=0.0), deviations_of_groups(rewards, num_generations)


def deviations_of_groups(rewards: Tensor, num_generations: int) -> Tensor:
    """The deviation [samples] of each one's group; NaN where that has fewer than two rewards."""
    grouped = by_group(rewards, num_generations)
    return deviation(grouped, dim=1).expand_as(grouped).reshape(-1)
