"""A KL coefficient that follows a target.

Source: Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences (arXiv 1909.08593), section 2.2:

    e = clip((KL - target) / target, -0.2, 0.2),  coefficient <- coefficient (1 + K e)

with K = samples / horizon, as their code (openai/lm-human-preferences), and OpenRLHF 0.11, have it.
"""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_ERROR = 0.2
"""That a coefficient answers to, in either direction, as a share of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KLControl:
    """What a coefficient follows; see `next_kl_coef`."""

    target: float
    horizon: int

    def allows(self, num_samples: int) -> bool:
        """Whether coefficients keep their sign in updates of so many samples."""
        return LARGEST_ERROR * num_samples < self.horizon


def next_kl_coef(kl_coef: float, kl: float, num_samples: int, *, target: float, horizon: int) -> float:
    """The coefficient of the next update.

    kl: measured over the update's `num_samples` responses, in the unit of `target`: nats per response in the paper.
    horizon: samples in which a coefficient changes by a fifth, roughly, while the KL is far from its target.

    Raises: ValueError for a KL that is not a number, and for settings under which a coefficient could leave its sign.
    """
    if not target > 0:
        raise ValueError(f"the target of the KL is {target}: it must be positive")
    if not 0 < LARGEST_ERROR * num_samples < horizon:
        raise ValueError(
            f"an update of {num_samples} samples and a horizon of {horizon}: "
            f"an update must have samples, and the horizon more than {LARGEST_ERROR} times as many"
        )
    if kl != kl:
        raise ValueError("the KL is NaN: no coefficient follows from it")
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return kl_coef * (1 + error * num_samples / horizon)
