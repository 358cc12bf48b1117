"""Online DPO: the best response of each group against its worst.

Source: Guo et al. 2024, Direct Language Model Alignment from Online AI Feedback (arXiv 2402.04792), for two responses;
Noukhovitch et al. 2024, Asynchronous RLHF (arXiv 2410.18252), for groups. Losses: DPO (arXiv 2305.18290), equation 7,
and IPO (arXiv 2310.12036), equation 17, on log-probabilities of whole responses, as both of them and TRL have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fuse.algorithms.groups import by_group
from fuse.micro_batch import Metric

ACCURACY = Metric("rewards/accuracies")
CHOSEN_REWARD = Metric("rewards/chosen")
MARGIN = Metric("rewards/margins")
REJECTED_REWARD = Metric("rewards/rejected")


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which responses are preferred to which: rows of one batch, int64 [pairs] each."""

    chosen: Tensor
    rejected: Tensor


def best_and_worst(scores: Tensor, num_generations: int) -> Pairs:
    """One pair of each group that has a score: the first sample of its highest, the first of its lowest.

    scores: [samples], the samples of a prompt consecutive; NaN is no score. Where all of a group are equal, they are
    one sample: such a pair has a loss, and no gradient.

    Raises: ValueError if the samples are not a number of whole groups.
    """
    grouped = by_group(scores, num_generations)
    missing = grouped.isnan()
    first = torch.arange(len(grouped), device=scores.device) * num_generations
    chosen = first + grouped.masked_fill(missing, -torch.inf).argmax(dim=1)
    rejected = first + grouped.masked_fill(missing, torch.inf).argmin(dim=1)
    scored = ~missing.all(dim=1)
    return Pairs(chosen[scored], rejected[scored])


def dpo_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    pairs: Pairs,
    *,
    beta: float,
    form: Literal["sigmoid", "ipo"] = "sigmoid",
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[Metric, Tensor]]:
    """The mean loss of the pairs, and its metrics; zero for none.

    logprobs, reference_logprobs: [rows], of whole responses: sums over tokens.
    form: "sigmoid" for -log sigmoid(beta h), "ipo" for (h - 1 / (2 beta))^2, where
        h = (log pi(chosen) - log pi(rejected)) - (log ref(chosen) - log ref(rejected)).
    weights: [pairs], to be summed with instead of the mean.

    Raises: ValueError for a beta that is not positive, and for another form.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: it must be positive")
    log_ratios = logprobs - reference_logprobs
    differences = log_ratios[pairs.chosen] - log_ratios[pairs.rejected]
    if form == "sigmoid":
        losses = -logsigmoid(beta * differences)
    elif form == "ipo":
        losses = (differences - 1 / (2 * beta)).square()
    else:
        raise ValueError(f"the form of the loss is {form!r}: it must be 'sigmoid' or 'ipo'")
    num_pairs = max(len(losses), 1)
    with torch.no_grad():
        rewards = beta * log_ratios.detach()
        sums = {
            ACCURACY: (differences > 0).float().sum(),
            CHOSEN_REWARD: rewards[pairs.chosen].sum(),
            MARGIN: beta * differences.sum(),
            REJECTED_REWARD: rewards[pairs.rejected].sum(),
        }
    loss = losses.sum() / num_pairs if weights is None else (losses * weights).sum()
    return loss, {metric: total / num_pairs for metric, total in sums.items()}
