"""Pairs among which longer responses are not preferred more often than shorter ones (ChatGLM-RLHF, arXiv 2404.00934).

A reward model that learns from people learns that they like long answers, and its policy writes ever longer ones. Here
pairs are dealt into buckets by the difference of their lengths, and in each bucket as many are kept in which the longer
response won as in which the shorter one did. The paper does not say where its buckets end: here they hold equal
numbers of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def length_buckets(differences: Sequence[int], num_buckets: int) -> list[int]:
    """The bucket of each pair by |difference|, 0 for the smallest; equal differences share one."""
    if not differences:
        return []
    sizes = np.abs(np.asarray(differences))
    edges = np.unique(np.quantile(sizes, np.linspace(0, 1, num_buckets + 1)[1:-1]))
    return [int(bucket) for bucket in np.searchsorted(edges, sizes, side="left")]


def balanced_by_length(differences: Sequence[int], num_buckets: int, seed: int) -> list[int]:
    """Indices, in order, of the pairs to keep; pairs of equal length all stay.

    differences: tokens of the chosen response less those of the rejected one. Which pairs stay is drawn from the seed.
    """
    generator = np.random.default_rng(seed)
    signs, buckets = np.sign(differences), np.asarray(length_buckets(differences, num_buckets), dtype=int)
    kept = [np.flatnonzero(signs == 0)]
    for bucket in np.unique(buckets):
        longer, shorter = (np.flatnonzero((signs == sign) & (buckets == bucket)) for sign in (1, -1))
        count = min(len(longer), len(shorter))
        kept += [generator.choice(indices, count, replace=False) for indices in (longer, shorter)]
    return sorted(int(index) for index in np.concatenate(kept))
