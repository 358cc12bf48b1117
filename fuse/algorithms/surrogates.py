"""What a token contributes to the loss of a policy without a critic, by the names of TRL's `loss_type` (trl 1.12).

Every surrogate maps the terms of a micro-batch's tokens to a loss per token, which the policy minimises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fuse.algorithms.sequences import Sequences

_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT = math.log(1e-8), 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SurrogateSettings:
    """Bounds of ratios, and shapes of weights.

    epsilon_low, epsilon_high: a ratio is clipped below 1 - the one and above 1 + the other; for `cispo` above
        `epsilon_high` itself. delta: a second bound from above, for negative advantages; None for none.
    sapo_temperature_*: of positive and other advantages. vespo_*: k and lambda of the weights' gamma shape.
    """

    epsilon_low: float
    epsilon_high: float
    delta: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Of the tokens of a micro-batch, [tokens] each.

    log_ratio: to the policy that sampled, by token. ratio: what counts as the ratio, of a token or of its sequence.
    correction: of the sampler's distribution to the trainer's; None where they are one.
    """

    logprobs: Tensor
    log_ratio: Tensor
    ratio: Tensor
    advantages: Tensor
    sequences: Sequences
    correction: Tensor | None = None


def clipped(terms: Terms, settings: SurrogateSettings) -> Tensor:
    """PPO's clipped ratio (arXiv 1707.06347, equation 7); with `delta` bounded for both signs (arXiv 2505.07291)."""
    bounded = terms.ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
    ratio = terms.ratio if settings.delta is None else terms.ratio.clamp(max=settings.delta)
    return -torch.min(ratio * terms.advantages, bounded * terms.advantages)


def cispo(terms: Terms, settings: SurrogateSettings) -> Tensor:
    """CISPO: the log-probability, weighted by a bounded ratio without gradient (MiniMax-M1, arXiv 2506.13585)."""
    return -terms.ratio.clamp(max=settings.epsilon_high).detach() * terms.advantages * terms.logprobs


def sapo(terms: Terms, settings: SurrogateSettings) -> Tensor:
    """SAPO: a sigmoid gate in place of clipping (arXiv 2511.20347)."""
    temperature = torch.where(terms.advantages > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
    return -torch.sigmoid(temperature * (terms.ratio - 1)) * 4 / temperature * terms.advantages


def vespo(terms: Terms, settings: SurrogateSettings) -> Tensor:
    """VESPO: the log-probability, weighted by a gamma-shaped function of the sequence's ratio (arXiv 2602.10693)."""
    return -terms.sequences.expand(vespo_weights(terms, settings)) * terms.advantages * terms.logprobs


@torch.no_grad()
def vespo_weights(terms: Terms, settings: SurrogateSettings) -> Tensor:
    """The weight of every sequence, [responses]; 1 where its ratio is."""
    sequences = terms.sequences
    log_weight = sequences.sum(terms.log_ratio.clamp(-_MOST_LOG_WEIGHT, _MOST_LOG_WEIGHT))
    if terms.correction is not None:
        log_weight += sequences.sum(terms.correction.log().clamp(_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT))
    log_weight = log_weight.clamp(_LEAST_LOG_WEIGHT, _MOST_LOG_WEIGHT)
    is_positive = sequences.sum((terms.advantages < 0).float()) == 0
    k = torch.where(is_positive, settings.vespo_k_pos, settings.vespo_k_neg)
    rate = torch.where(is_positive, settings.vespo_lambda_pos, settings.vespo_lambda_neg).clamp(min=1e-4)
    return (rate + k * log_weight - rate * log_weight.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


Surrogate = Callable[[Terms, SurrogateSettings], Tensor]

SURROGATES: Mapping[str, Surrogate] = MappingProxyType(
    {
        "grpo": clipped,  # arXiv 2402.03300
        "bnpo": clipped,  # arXiv 2506.02864
        "dr_grpo": clipped,  # arXiv 2503.20783
        "dapo": clipped,  # arXiv 2503.14476
        "luspo": clipped,  # arXiv 2602.05261
        "cispo": cispo,
        "sapo": sapo,
        "vespo": vespo,
    }
)
