"""PPO: advantages from a critic's values, a clipped policy loss, a clipped value loss.

Source: Schulman et al. 2017 (arXiv 1707.06347).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from fuse.algorithms.algorithm import Algorithm, Early, LossNormalization
from fuse.algorithms.batch import Experience
from fuse.algorithms.gae import GAESettings, estimate
from fuse.algorithms.policy_loss import PolicyTargets, clipped_policy_loss
from fuse.algorithms.value_loss import ValueTargets, clipped_value_loss
from fuse.sample import Sample, SpecialTokens


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
        early=_early(settings, special),
    )


def _early(settings: PPOSettings, special: SpecialTokens) -> Early | None:
    """The critic's part: returns need only the sample's own scores, unless rewards are whitened over the batch.

    A value after the last token counts unless the response is as wide as the batch. The actor's advantages are whitened
    over the batch.
    """
    if settings.gae.whiten_rewards:
        return None

    def of_critic(samples: Sequence[Sample], width: int) -> Experience:
        experience, _ = estimate(samples, settings=settings.gae, special=special, width=width)
        return replace(experience, targets={"critic": experience.targets["critic"]})

    return Early(
        role="critic",
        estimate=of_critic,
        mean_over="step" if settings.loss_normalization == "token" else "micro_batch",
        needs_longer=True,
    )
