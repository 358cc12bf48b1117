"""Proximal RLOO: PPO's clipped surrogate with a response as one action.

Source: Noukhovitch et al. 2024, Asynchronous RLHF (arXiv 2410.18252), where leave-one-out advantages meet responses of
an older policy. PPO's equation 7 (arXiv 1707.06347), with the ratio of whole responses:

    rho = exp(log pi(y) - log pi_old(y)),  loss = -min(rho A, clip(rho, 1 - cliprange, 1 + cliprange) A)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.algorithms.policy_loss import clipped_surrogate
from fuse.micro_batch import Metric


def proximal_rloo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float
) -> tuple[Tensor, dict[Metric, Tensor]]:
    """The mean loss of responses and its metrics; zero for none.

    logprobs, old_logprobs: [rows], of whole responses: sums over tokens. advantages: [rows]; 0 for a response without
    a reward, which counts in the mean.

    Raises: ValueError for shapes that differ, and for a clip range that is not positive.
    """
    if not logprobs.shape == old_logprobs.shape == advantages.shape:
        raise ValueError(
            f"logprobs, old_logprobs and advantages are {list(logprobs.shape)}, {list(old_logprobs.shape)} and "
            f"{list(advantages.shape)}: pass one of each for every response"
        )
    if not cliprange > 0:
        raise ValueError(f"the clip range is {cliprange}: it must be positive")
    counted = torch.ones_like(advantages, dtype=torch.bool)
    return clipped_surrogate(logprobs, old_logprobs, advantages, counted, cliprange)
