"""Pairs of RLHF Workflow: by hand, and as its code picks them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse.algorithms.best_of_n import max_min_pairs

NAN = math.nan


def pairs(scores: list[float], num_generations: int) -> list[tuple[int, int]]:
    found = max_min_pairs(torch.tensor(scores), num_generations)
    return list(zip(found.chosen.tolist(), found.rejected.tolist(), strict=True))


def test_groups_of_equal_scores_give_no_pair() -> None:
    assert pairs([0.1, 0.9, 0.5, 2, 2, 2, -1, -1, -3], 3) == [(1, 0), (6, 8)]


def test_missing_scores_are_in_no_pair() -> None:
    assert pairs([NAN, 0.9, 0.5, NAN, NAN, NAN, 1, NAN, NAN], 3) == [(1, 2)]


def rlhf_workflow(scores: list[float], num_generations: int) -> list[tuple[int, int]]:
    """`choose_type` max_min of its prepare_data."""
    found = []
    for first in range(0, len(scores), num_generations):
        rewards = scores[first : first + num_generations]
        best, worst = int(np.argmax(rewards)), int(np.argmin(rewards))
        if rewards[best] > rewards[worst]:
            found.append((first + best, first + worst))
    return found


@given(scores=st.lists(st.sampled_from([0.0, 0.25, 1.0]), max_size=24).filter(lambda scores: len(scores) % 3 == 0))
def test_equals_rlhf_workflow(scores: list[float]) -> None:
    assert pairs(scores, 3) == rlhf_workflow(scores, 3)


def test_refuses_groups_that_are_not_whole() -> None:
    with pytest.raises(ValueError, match="not whole groups of 2"):
        pairs([0.0, 1.0, 2.0], 2)
