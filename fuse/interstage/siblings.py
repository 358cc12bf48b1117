"""What samples of one prompt tell of each other's lengths: shared gamma frailty.

Each prompt has a factor theta ~ Gamma(mean 1, variance v), and a sample of it ends at theta times the hazard of a
cumulative H(t). Over all prompts that gives the pooled curve S, which ties H to it:

    S(t) = (1 + v H(t)) ** (-1 / v)      so that, with the growth G(t) = S(t) ** -v,      v H(t) = G(t) - 1

Of a prompt of whose samples d have ended, and all together have lived through E = sum of H(their tokens), theta has
Gamma(1 / v + d, 1 / v + E), and a live sample of age a

    P(length > t) = (x / (x + G(t) - G(a))) ** (1 / v + d)      with the exposure x = 1 + v E.

A lone sample has x = G(a) and d = 0, which leaves S(t) / S(a). Sources: Clayton 1978; Vaupel, Manton, Stallard 1979.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_VARIANCES = np.geomspace(0.02, 8.0, 48)
"""Of theta, that are tried; v = 8 has siblings alike to Kendall's tau = v / (2 + v) = 0.8."""
_FEWEST_GROUPS = 8
"""Of two samples or more, below which nothing is learnt."""
_CRITICAL = 9.55
"""Of twice the gain in log-likelihood: at the edge v = 0 it is exceeded by chance with probability 0.001."""


def learn_variance(survival: Floats, ended: Bools, groups: Ints) -> float:
    """The variance v of theta that is most likely; 0 with few groups, or if independent lengths are as likely.

    survival [n]: S at each response's length, as the pooled curve has it. ended [n]: false for those that were cut
    there. groups [n]: numbers, equal for siblings. Source: Shih and Louis 1995, estimation in two stages.
    """
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if np.count_nonzero(sizes > 1) < _FEWEST_GROUPS:
        return 0.0
    has_siblings = sizes[groups] > 1
    survival, ended, groups = survival[has_siblings], ended[has_siblings], groups[has_siblings]
    gains = [log_likelihood(float(variance), survival, ended, groups) for variance in _VARIANCES]
    best = int(np.argmax(gains))
    gain = gains[best] - log_likelihood(0.0, survival, ended, groups)
    return float(_VARIANCES[best]) if 2 * gain > _CRITICAL else 0.0


def log_likelihood(variance: float, survival: Floats, ended: Bools, groups: Ints) -> float:
    """Of lengths, less the logarithm of the pooled density at those that ended; arguments as of `learn_variance`.

    theta integrated out, d of a group's samples have likelihood prod(1 + j v, j < d) * x ** -(1 / v + d), times
    S ** -(v + 1) of each.
    """
    logs = np.log(survival)
    if variance == 0:
        return float(logs[~ended].sum())
    num_ended = np.bincount(groups, weights=ended)
    exposures = 1 + np.bincount(groups, weights=np.expm1(-variance * logs))
    factors = np.append(0.0, np.cumsum(np.log1p(variance * np.arange(num_ended.max(initial=0)))))
    of_groups = factors[num_ended.astype(np.int64)] - (1 / variance + num_ended) * np.log(exposures)
    return float(of_groups.sum() - (variance + 1) * logs[ended].sum())


def weigh(
    prompts: Ints, growth: Floats, ended_prompts: Ints, ended_growth: Floats, counts: Bools
) -> tuple[Floats, Floats]:
    """Of each live sample's group, how many have ended, d, and the exposure x, [live] each.

    prompts, growth [live]: a number, equal for siblings, and G(age). ended_prompts, ended_growth [ended]: of those that
    are over. counts [ended]: false for those that the limit has cut.
    """
    num_prompts = 1 + max(int(prompts.max(initial=0)), int(ended_prompts.max(initial=0)))
    num_ended, exposures = np.zeros(num_prompts), np.ones(num_prompts)
    num_ended += np.bincount(ended_prompts, weights=counts, minlength=num_prompts)
    exposures += np.bincount(prompts, weights=growth - 1, minlength=num_prompts)
    exposures += np.bincount(ended_prompts, weights=ended_growth - 1, minlength=num_prompts)
    return num_ended[prompts], exposures[prompts]


def survival_given(gain: Floats, variance: float, num_ended: Floats, exposure: Floats) -> Floats:
    """P(length > t) of live samples, [n, points]; gain [n, points]: G(t) - G(age); num_ended, exposure [n]."""
    logs = np.log(gain + exposure[:, None])
    logs -= np.log(exposure)[:, None]
    logs *= -(1 / variance + num_ended)[:, None]
    probability: Floats = np.exp(logs, out=logs)
    return probability


def pooled_level(level: Floats | float, growth: Floats, variance: float, num_ended: Floats, exposure: Floats) -> Floats:
    """S(t) at the t that a live sample's length does not exceed with probability `level`, [n]; growth [n]: G(age)."""
    gain = exposure * np.expm1(-np.log1p(-np.asarray(level)) / (1 / variance + num_ended))
    height: Floats = (growth + gain) ** (-1 / variance)
    return height
