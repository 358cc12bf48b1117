"""Prompts whose sampled rewards have no spread: which they are, in an update of groups and before a run of PPO.

Responses that are rewarded alike tell nothing apart, and where rewards are nearly alike, their differences are the
reward model's noise, which a division by their deviation makes as large as any signal.

Source: Hou et al. 2024, "ChatGLM-RLHF" (arXiv 2404.00934): before PPO several responses are sampled to each prompt, and
prompts are dropped whose rewards have a low variance. How many responses, and which variance, is not confirmed.
Deviations: the variance is that of samples, with n - 1; prompts are tried as far as the run will consume them; where
an algorithm samples groups anyway, each update looks at its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from fuse.algorithms.dynamic_sampling import groups_with_spread
from fuse.algorithms.group_advantages import weighted_sum
from fuse.sample import Group, Sample

FIRST_PROBE_ID = 1 << 42
"""Sample ids of responses that prompts are tried by, row after row: apart from all others."""

_logger = logging.getLogger(__name__)


def alike(min_variance: float | None) -> str:
    """What is wrong with such rewards, in words."""
    return "equal rewards" if not min_variance else f"rewards of a variance below {min_variance:g}"


def without_spread(
    samples: Sequence[Sample], num_generations: int, reward_weights: Sequence[float], min_variance: float | None
) -> list[int]:
    """Numbers of the groups without spread. reward_weights: of the functions that count."""
    total = weighted_sum(torch.tensor([sample.rewards for sample in samples]), torch.tensor(reward_weights))
    has_spread = groups_with_spread(total, num_generations, min_variance).tolist()
    return [group for group, has in enumerate(has_spread) if not has]


def filtered_groups(
    samples: Sequence[Sample], num_generations: int, reward_weights: Sequence[float], min_variance: float | None
) -> dict[str, float]:
    """Say which of an update's groups teach nothing for their variance; metrics. Nothing without a least variance."""
    if min_variance is None:
        return {}
    num_groups = len(samples) // num_generations
    filtered = len(without_spread(samples, num_generations, reward_weights, min_variance))
    if filtered == num_groups:
        _logger.warning(
            "spread filter: all %d groups have %s, and the update learns nothing of them: lower min_reward_variance, "
            "or choose prompts that are neither too easy nor too hard",
            *(num_groups, alike(min_variance)),
        )
    elif filtered:
        _logger.info(
            "spread filter: %d of %d groups have %s, and teach nothing", filtered, num_groups, alike(min_variance)
        )
    return {"spread_filter/groups": float(filtered)}


def untried(
    variances: Sequence[float | None],
    order: Sequence[int],
    *,
    num_needed: int,
    min_variance: float,
    num_together: int,
) -> Iterator[list[int]]:
    """Rows of the dataset whose prompts are to be tried, some at a time, until as many have spread as are needed.

    variances: by row; those of the rows given before are looked at when the next are asked for. order: of rows.
    """
    place, num_kept = 0, 0
    while place < len(order) and num_kept < num_needed:
        some = order[place : place + num_together]
        if missing := [row for row in some if variances[row] is None]:
            yield missing
        place += num_together
        num_kept += sum(has_spread(variances[row], min_variance) for row in some)


def probes(rows: Sequence[int], num_probes: int, samples_of: Callable[[Sequence[int]], list[Sample]]) -> list[Sample]:
    """So many samples of each row, side by side. samples_of: new samples of rows, in their order."""
    samples = samples_of([row for row in rows for _ in range(num_probes)])
    for index, sample in enumerate(samples):
        row, probe = rows[index // num_probes], index % num_probes
        sample.id = FIRST_PROBE_ID + row * num_probes + probe
        sample.group = Group(FIRST_PROBE_ID + row, num_probes)
    return samples


def score_variances(samples: Sequence[Sample], num_probes: int) -> list[float]:
    """Of the scores of each row's `probes`."""
    scores = np.array([sample.score for sample in samples], dtype=np.float64).reshape(-1, num_probes)
    variances: list[float] = scores.var(axis=1, ddof=1).tolist()
    return variances


def has_spread(variance: float | None, min_variance: float) -> bool:
    """Whether a prompt is used: its variance is not known, or large enough, and not 0."""
    return variance is None or (variance > 0 and variance >= min_variance)


def left_out(variances: Sequence[float | None], min_variance: float, *, batch_size: int) -> frozenset[int]:
    """Rows without spread; says how many.

    Raises: ValueError where fewer than a batch of rows are left.
    """
    rows = frozenset(row for row, variance in enumerate(variances) if not has_spread(variance, min_variance))
    num_known = sum(variance is not None for variance in variances)
    if len(variances) - len(rows) < batch_size:
        raise ValueError(
            f"min_reward_variance={min_variance:g} leaves {len(variances) - len(rows)} of {len(variances)} prompts, "
            f"fewer than one batch of {batch_size}: lower it, or add prompts that are neither too easy nor too hard"
        )
    _logger.info(
        "spread filter: %d of %d prompts that were tried have %s, and are left out",
        *(len(rows), num_known, alike(min_variance)),
    )
    return rows
