"""What PPO makes of scores before it estimates advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fuse.algorithms.batch import Experience
from fuse.algorithms.gae import GAESettings, estimate
from fuse.sample import Sample, SampleState, SpecialTokens

SPECIAL = SpecialTokens(pad=0, eos=(1,), stop=(1,))
SCORES = (-7.0, 0.25, 3.0, 1.5)


def samples(scores: Sequence[float], baselines: Sequence[float | None]) -> list[Sample]:
    """The last one's response does not end."""
    random = np.random.default_rng(0)
    made = []
    for index, score in enumerate(scores):
        length = 2 + index
        sample = Sample(index, (2, 3), state=SampleState.SCORED, length=length, score=score, baseline=baselines[index])
        sample.response_ids = [*range(4, 3 + length), 1 if index < len(scores) - 1 else 5]
        sample.logprobs = (-2 + random.random(length)).tolist()
        sample.reference_logprobs = np.asarray(sample.logprobs, dtype=np.float32) - 0.1
        sample.values = random.random(length + 1).astype(np.float32)
        made.append(sample)
    return made


def of(
    scores: Sequence[float], baselines: Sequence[float | None] = (None,) * 4, **options: Any
) -> tuple[Experience, dict[str, float]]:
    settings = GAESettings(
        **{"kl_coef": 0.05, "kl_estimator": "k1", "whiten_rewards": False, "gamma": 1.0, "lam": 0.95}
        | {"missing_eos_penalty": None}
        | options
    )
    return estimate(samples(scores, baselines), settings=settings, special=SPECIAL)


def learnt(experience: Experience) -> list[torch.Tensor]:
    actor, critic = (experience.targets[role] for role in ("actor", "critic"))
    return [actor.advantages, critic.returns]  # type: ignore[attr-defined]


def test_clipped_scores_teach_what_scores_at_the_bounds_would() -> None:
    clipped, metrics = of(SCORES, reward_range=(-1.0, 2.0))
    by_hand, plain = of((-1.0, 0.25, 2.0, 1.5))
    for one, other in zip(learnt(clipped), learnt(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert metrics["objective/scores_clipped"] == 0.5
    assert metrics["objective/rlhf_reward"] == plain["objective/rlhf_reward"], "is what is learnt from"
    assert metrics["objective/scores"] == pytest.approx(sum(SCORES) / 4), "are told as they are"
    assert "objective/scores_clipped" not in plain


def test_the_penalty_of_responses_without_end_is_within_the_bounds() -> None:
    clipped, _ = of(SCORES, reward_range=(-1.0, 2.0), missing_eos_penalty=4.0)
    by_hand, _ = of((-1.0, 0.25, 2.0, -1.0))
    for one, other in zip(learnt(clipped), learnt(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_scores_count_from_their_baselines_before_they_are_clipped() -> None:
    """And before the penalty of responses without end, which is none of the baseline's."""
    baselines = (-6.5, 0.25, -1.0, 0.5)
    counted, metrics = of(SCORES, baselines, reward_range=(-2.0, 3.0), missing_eos_penalty=4.0)
    by_hand, _ = of((-0.5, 0.0, 3.0, -2.0))
    for one, other in zip(learnt(counted), learnt(by_hand), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert metrics["objective/scores"] == pytest.approx((sum(SCORES) - 4) / 4)
    assert metrics["objective/scores_over_reference"] == pytest.approx((-0.5 + 0.0 + 4.0 - 3.0) / 4)
    assert metrics["objective/scores_clipped"] == 0.5
