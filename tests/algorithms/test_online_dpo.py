"""Which pairs an update of online DPO trains on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fuse.algorithms.group_batch import GroupSettings
from fuse.algorithms.online_dpo import PairTargets, estimate_pairs
from fuse.sample import Sample, SampleState, SpecialTokens

SPECIAL = SpecialTokens(pad=0, eos=(1,), stop=(1,))


def sample(number: int, reward: float, response: list[int]) -> Sample:
    made = Sample(id=number, prompt_ids=(7,), state=SampleState.SCORED, response_ids=response, length=len(response))
    made.logprobs = [-0.1 * number] * len(response)
    made.reference_logprobs = np.full(len(response), -0.2 * number, dtype=np.float32)
    made.rewards = [reward]
    return made


def group(num_generations: int, **penalties: object) -> GroupSettings:
    return GroupSettings(
        num_generations=num_generations,
        rollout_size=2 * num_generations,
        reward_names=("one",),
        reward_weights=(1.0,),
        penalties=penalties,  # type: ignore[arg-type]
    )


def test_the_best_and_the_worst_of_each_group_lie_side_by_side() -> None:
    rewards = [0.5, -1.0, 2.0, 1.0, 4.0, 0.0]
    samples = [sample(index, reward, [10 + index] * (index + 1)) for index, reward in enumerate(rewards)]
    experience, metrics = estimate_pairs(samples, settings=group(3), special=SPECIAL)
    assert [response[0] - 10 for response in experience.responses] == [2, 1, 4, 5]
    assert experience.lengths == (3, 2, 5, 6)
    targets = experience.targets["actor"]
    assert isinstance(targets, PairTargets)
    assert targets.reference_logprobs[:5].tolist() == pytest.approx([-0.4] * 3 + [-0.2] * 2)
    assert metrics["objective/scores_margin"] == pytest.approx((3 + 4) / 2)
    assert metrics["completions/mean_length"] == 3.5, "of all that was generated"
    assert metrics["kl"] == pytest.approx(sum(0.1 * i * (i + 1) for i in range(6)) / 21)


def test_groups_of_equal_rewards_or_none_teach_nothing() -> None:
    """One response twice: the loss of its pair has no gradient."""
    rewards = [1.0, 1.0, math.nan, math.nan]
    samples = [sample(index, reward, [10 + index, 1]) for index, reward in enumerate(rewards)]
    experience, metrics = estimate_pairs(samples, settings=group(2), special=SPECIAL)
    assert [response[0] - 10 for response in experience.responses] == [0, 0, 2, 2]
    assert metrics["objective/scores_margin"] == 0


def test_a_response_that_is_not_rewarded_is_in_no_pair() -> None:
    samples = [sample(index, reward, [10 + index]) for index, reward in enumerate([math.nan, 2.0, 1.0, 5.0, 6.0, 7.0])]
    experience, _ = estimate_pairs(samples, settings=group(3), special=SPECIAL)
    assert [response[0] - 10 for response in experience.responses] == [1, 2, 5, 3]


def test_penalties_decide_who_is_worse() -> None:
    def of_unended(lengths: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        return -2.0 * (~ended).float()

    samples = [sample(0, 1.0, [10, 3]), sample(1, 0.5, [11, 1]), sample(2, 1.0, [12, 1]), sample(3, 0.0, [13, 1])]
    experience, metrics = estimate_pairs(samples, settings=group(2, missing=of_unended), special=SPECIAL)
    assert [response[0] - 10 for response in experience.responses] == [1, 0, 2, 3]
    assert metrics["rewards/missing/mean"] == -0.5
