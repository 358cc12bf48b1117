"""Which groups teach something: not those whose rewards are all equal, or nearly so.

Source: Yu et al. 2025, DAPO (arXiv 2503.14476), section 3.2, equation 11: 0 < number of correct responses < G. For
rewards that are not right or wrong, the same rule reads: not all of a group are equal, or its advantages are zero.
OpenRLHF 0.11 asks for a mean strictly between two rewards, which is the same for rewards that are one of the two.

A least variance is the prompt filter of Hou et al. 2024, ChatGLM-RLHF (arXiv 2404.00934), whose threshold is not known.
Theirs goes over prompts once, before training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.algorithms.group_advantages import variance
from fuse.algorithms.groups import by_group


def groups_with_spread(rewards: Tensor, num_generations: int, min_variance: float | None = None) -> Tensor:
    """Which groups to keep, bool [groups]: those with two different rewards.

    rewards: [samples], the samples of a prompt consecutive; NaN is no reward. min_variance: that their sample variance
    must have, too.

    Raises: ValueError if the samples are not a number of whole groups.
    """
    grouped = by_group(rewards, num_generations)
    missing = grouped.isnan()
    largest = grouped.masked_fill(missing, -torch.inf).amax(dim=1)
    differ = largest > grouped.masked_fill(missing, torch.inf).amin(dim=1)
    return differ if min_variance is None else differ & (variance(grouped, dim=1)[:, 0] >= min_variance)
