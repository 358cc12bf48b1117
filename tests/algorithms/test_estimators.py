"""Every estimator of the table, by hand, on one rollout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuse.algorithms.estimators import ESTIMATORS, EstimatorSettings
from fuse.algorithms.group_batch import GroupSettings, Scored

REWARDS = torch.tensor([[1.0], [3.0], [2.0], [2.0]])
LENGTHS = [2, 1, 1, 1]
KL = torch.tensor([0.5, -0.5, 1.0, 0.0, 2.0])
SCORED = Scored(
    rewards=REWARDS,
    token_kl=KL,
    kl=torch.tensor([0.0, 1.0, 0.0, 2.0]),
    token_offsets=torch.tensor([0, 2, 3, 4, 5]),
    reference_logprobs=torch.tensor([-1.0, -1.0, -2.0, -5.0]),
)
GROUP = GroupSettings(num_generations=2, rollout_size=4, reward_names=("one",), reward_weights=(1.0,))


def advantages(name: str, scored: Scored = SCORED, **options: object) -> Tensor:
    settings = EstimatorSettings(group=GROUP, **options)  # type: ignore[arg-type]
    return ESTIMATORS[name].estimate(scored, settings)[0]


def test_group() -> None:
    root = math.sqrt(2) + 1e-4
    assert advantages("group").tolist() == pytest.approx([-1 / root, -1 / root, 1 / root, 0, 0])
    assert advantages("group", scale="none").tolist() == pytest.approx([-1, -1, 1, 0, 0])


def test_leave_one_out_takes_the_penalty_of_whole_responses() -> None:
    """Rewards 1, 3 - 0.5, 2, 2 - 1, against the other one's."""
    expected = [1 - 2.5, 1 - 2.5, 2.5 - 1, 1.0, -1.0]
    assert advantages("leave_one_out", beta=0.5).tolist() == pytest.approx(expected)
    assert advantages("leave_one_out", reward_range=(2.0, 9.0)).tolist() == pytest.approx([-1, -1, 1, 0, 0])


def test_reinforce_plus_plus_discounts_and_whitens_over_all_tokens() -> None:
    """Token rewards -0.05, 1.05 | 2.9 | 2 | 1.8; the first token's return is -0.05 + 0.5 x 1.05."""
    returns = torch.tensor([-0.05 + 0.5 * 1.05, 1.05, 2.9, 2.0, 1.8])
    expected = (returns - returns.mean()) / returns.std(correction=0)
    found = advantages("reinforce++", beta=0.1, gamma=0.5)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert found[0] != found[1], "tokens of one response differ"


def test_reinforce_plus_plus_clips_rewards_before_the_penalty() -> None:
    returns = torch.tensor([1.0, 1.05, 1.4, 1.5, 1.3])  # rewards 1, 1.5, 1.5, 1.5
    expected = (returns - returns.mean()) / returns.std(correction=0)
    found = advantages("reinforce++", beta=0.1, reward_range=(0.0, 1.5))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_reinforce_plus_plus_baseline_takes_the_mean_of_the_group_off() -> None:
    returns = torch.tensor([-1.0, -0.95, 0.9, 0.0, -0.2])  # rewards -1, 1, 0, 0 less the penalties to come
    expected = (returns - returns.mean()) / returns.std(correction=0)
    found = advantages("reinforce++-baseline", beta=0.1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_grpovi_compares_rewards_whose_variance_is_increased() -> None:
    """Of four, likelier ones count more: probabilities in proportion to 1, 1, 1, 0 and rewards 1, .6, .2, 0.

    The expectation 0.6 allows for one reward of 1, and 0.8 for the second; the others become 0.
    """
    scored = Scored(
        rewards=torch.tensor([[0.2], [1.0], [0.0], [0.6]]),
        token_kl=torch.zeros(4),
        kl=torch.zeros(4),
        token_offsets=torch.arange(5),
        reference_logprobs=torch.tensor([-1.0, -1.0, -900.0, -1.0]),
    )
    group = GroupSettings(num_generations=4, rollout_size=4, reward_names=("one",), reward_weights=(1.0,))
    found, _ = ESTIMATORS["grpovi"].estimate(scored, EstimatorSettings(group=group, scale="none"))
    assert found.tolist() == pytest.approx([-0.45, 0.55, -0.45, 0.35], abs=1e-6)


def test_what_each_needs() -> None:
    assert {name for name, one in ESTIMATORS.items() if one.least_generations == 1} == {"reinforce++"}
    assert {name for name, one in ESTIMATORS.items() if one.needs_reference} == {"grpovi"}
    assert not any(one.by_token and not one.penalizes for one in ESTIMATORS.values())
