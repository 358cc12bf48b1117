"""Policy gradients without a critic: an estimator of advantages and a loss of the policy, which may be combined.

GRPO is `group` with `grpo_loss` (Shao et al. 2024, arXiv 2402.03300), RLOO `leave_one_out` with `rloo_loss` (Ahmadian
et al. 2024, arXiv 2402.14740), REINFORCE++ `reinforce++` with `grpo_loss` (Hu et al. 2025, arXiv 2501.03262).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.estimators import ESTIMATORS, EstimatorSettings
from fuse.algorithms.group_batch import GroupTargets, Scored, estimate
from fuse.micro_batch import Loss
from fuse.sample import SpecialTokens


def policy_gradient(
    advantage: str,
    settings: EstimatorSettings,
    loss: Loss,
    special: SpecialTokens,
    *,
    is_separable: bool = True,
    has_reference: bool = False,
) -> Algorithm:
    """The algorithm of this estimator, by its name, and this loss, on responses that these tokens end.

    is_separable: whether the loss is a sum of terms of single responses. has_reference: whether there is one.
    """

    def advantages_of(scored: Scored) -> tuple[Tensor, Tensor]:
        return ESTIMATORS[advantage].estimate(scored, settings)

    estimator = ESTIMATORS[advantage]
    late = set[str]()
    if not (estimator.penalizes and settings.beta):  # else advantages are of both
        late.add("old_logprobs")
        if has_reference and not estimator.needs_reference:
            late.add("reference_logprobs")
    return Algorithm(
        estimate=partial(estimate, settings=settings.group, advantages_of=advantages_of, special=special),
        losses={"actor": loss},
        targets={"actor": GroupTargets},
        units={"actor": 1} if is_separable else {},
        late=frozenset(late),
    )
