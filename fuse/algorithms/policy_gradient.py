"""Policy gradients without a critic: an estimator of advantages and a loss of the policy, which may be combined.

GRPO is `group` with `grpo_loss` (Shao et al. 2024, arXiv 2402.03300), RLOO `leave_one_out` with `rloo_loss` (Ahmadian
et al. 2024, arXiv 2402.14740), REINFORCE++ `reinforce++` with `grpo_loss` (Hu et al. 2025, arXiv 2501.03262).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fuse.algorithms.algorithm import PROVISIONAL_TOKENS, Algorithm, Early, MeanOver
from fuse.algorithms.batch import Experience
from fuse.algorithms.estimators import ESTIMATORS, EstimatorSettings
from fuse.algorithms.group_batch import Advantages, GroupSettings, GroupTargets, Scored, estimate
from fuse.micro_batch import Loss
from fuse.sample import Sample, SpecialTokens


def policy_gradient(
    advantage: str,
    settings: EstimatorSettings,
    loss: Loss,
    special: SpecialTokens,
    *,
    is_separable: bool = True,
    has_reference: bool = False,
    mean_over: MeanOver | None = None,
) -> Algorithm:
    """The algorithm of this estimator, by its name, and this loss, on responses that these tokens end.

    is_separable: whether the loss is a sum of terms of single responses. has_reference: whether there is one.
    mean_over: of the loss; None where nothing is to be trained before all samples are scored.
    """

    def advantages_of(scored: Scored) -> tuple[Tensor, Tensor]:
        return ESTIMATORS[advantage].estimate(scored, settings)

    estimator = ESTIMATORS[advantage]
    late = set[str]()
    if not (estimator.penalizes and settings.beta):  # else advantages are of both
        late.add("old_logprobs")
        if has_reference and not estimator.needs_reference:
            late.add("reference_logprobs")
    early = None
    if mean_over is not None and is_separable and estimator.within_groups(settings):
        early = _early(settings.group, advantages_of, special, mean_over)
    return Algorithm(
        estimate=partial(estimate, settings=settings.group, advantages_of=advantages_of, special=special),
        losses={"actor": loss},
        targets={"actor": GroupTargets},
        units={"actor": 1} if is_separable else {},
        late=frozenset(late),
        early=early,
    )


def _early(group: GroupSettings, advantages_of: Advantages, special: SpecialTokens, mean_over: MeanOver) -> Early:
    """Complete groups, whose advantages need nothing else."""

    def of_groups(samples: Sequence[Sample], width: int) -> Experience:
        settings = replace(group, rollout_size=len(samples))
        experience, _ = estimate(samples, settings=settings, advantages_of=advantages_of, special=special)
        targets: Any = experience.targets["actor"]
        weights = torch.full_like(targets.batch_weights, 1 / PROVISIONAL_TOKENS)
        return replace(experience, targets={"actor": replace(targets, batch_weights=weights)})

    return Early(role="actor", estimate=of_groups, mean_over=mean_over, by_group=True, rollout_size=group.rollout_size)
