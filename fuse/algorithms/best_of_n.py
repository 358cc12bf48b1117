"""Iterated DPO on the best and the worst of n responses; the loss is `fuse.algorithms.online_dpo_loss.dpo_loss`.

Source: Dong et al. 2024, RLHF Workflow (arXiv 2405.07863), whose code (RLHFlow/Online-RLHF) calls these pairs max_min.
"""

from __future__ import annotations

from torch import Tensor

from fuse.algorithms.online_dpo_loss import Pairs, best_and_worst


def max_min_pairs(scores: Tensor, num_generations: int) -> Pairs:
    """One pair of each group that has two different scores: its best sample and its worst.

    scores: [samples], the samples of a prompt consecutive; NaN is no score.

    Raises: ValueError if the samples are not a number of whole groups.
    """
    pairs = best_and_worst(scores, num_generations)
    differ = scores[pairs.chosen] > scores[pairs.rejected]
    return Pairs(pairs.chosen[differ], pairs.rejected[differ])
