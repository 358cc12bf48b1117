"""PPO: advantages from a critic's values, a clipped policy loss, a clipped value loss.

Source: Schulman et al. 2017 (arXiv 1707.06347).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fuse.algorithms.algorithm import Algorithm, LossNormalization
from fuse.algorithms.gae import GAESettings, estimate
from fuse.algorithms.policy_loss import PolicyTargets, clipped_policy_loss
from fuse.algorithms.value_loss import ValueTargets, clipped_value_loss
from fuse.sample import SpecialTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    """temperature, num_tokens: of sampling. vf_coef: weight of the value loss.

    cliprange, cliprange_value: of ratios, of values; None clips none. loss_normalization: as of `Algorithm`.
    """

    gae: GAESettings
    temperature: float
    cliprange: float
    vf_coef: float
    cliprange_value: float | None
    num_tokens: int | None = None
    loss_normalization: LossNormalization = "micro_batch"


def ppo(settings: PPOSettings, special: SpecialTokens) -> Algorithm:
    """PPO with these settings, on responses that these tokens end."""
    return Algorithm(
        estimate=partial(estimate, settings=settings.gae, special=special),
        losses={
            "actor": partial(
                clipped_policy_loss,
                temperature=settings.temperature,
                cliprange=settings.cliprange,
                num_tokens=settings.num_tokens,
            ),
            "critic": partial(clipped_value_loss, vf_coef=settings.vf_coef, cliprange=settings.cliprange_value),
        },
        targets={"actor": PolicyTargets, "critic": ValueTargets},
        units={"actor": 1, "critic": 1},
        loss_normalization=settings.loss_normalization,
    )
