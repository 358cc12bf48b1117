"""Which groups dynamic sampling keeps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuse.algorithms.dynamic_sampling import groups_with_spread

NAN = math.nan


def test_keeps_groups_with_two_different_rewards() -> None:
    rewards = torch.tensor([1, 1, 1, 0, 1, 1, 0, 0, 0, 0.3, 0.3, 0.30001])
    assert groups_with_spread(rewards, 3).tolist() == [False, True, False, True]


def test_a_missing_reward_makes_no_spread() -> None:
    rewards = torch.tensor([1, NAN, 1, 0, NAN, 1, NAN, NAN, 1, NAN, NAN, NAN])
    assert groups_with_spread(rewards, 3).tolist() == [False, True, False, False]


def test_a_single_sample_has_no_spread() -> None:
    assert not groups_with_spread(torch.tensor([0.0, 1.0]), 1).any()


@given(groups=st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4), max_size=6))
def test_of_right_and_wrong_answers_it_is_the_rule_of_the_paper_and_of_openrlhf(groups: list[list[float]]) -> None:
    kept = groups_with_spread(torch.tensor([reward for group in groups for reward in group]), 4).tolist()
    assert kept == [0 < sum(reward == 1 for reward in group) < 4 for group in groups]
    assert kept == [0.0 < sum(group) / len(group) < 1.0 for group in groups]


def test_refuses_groups_that_are_not_whole() -> None:
    with pytest.raises(ValueError, match="not whole groups of 4"):
        groups_with_spread(torch.zeros(6), 4)


def test_a_least_variance_is_that_of_samples() -> None:
    rewards = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 1.0, NAN, 3.0])
    assert groups_with_spread(rewards, 2, min_variance=2.0).tolist() == [True, False, False, False]
    assert groups_with_spread(rewards, 2, min_variance=0.0).tolist() == [True, True, False, False]
