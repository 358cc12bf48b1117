"""Roles are data: what is asked of them is asked of every model that is there, also where several are for the same."""

from __future__ import annotations

import numpy as np

from fuse.driver.stage_by_stage import apply_inference
from fuse.roles import numbered, role_of, scoring, training
from fuse.sample import Sample, SampleState
from fuse.training.reading import TokenSequence
from fuse.training.scoring import inferences


def test_several_models_of_a_role_are_named_and_found() -> None:
    assert numbered("reward", 0) == ()
    assert numbered("reward", 3) == ("reward", "reward_1", "reward_2")
    given = ["reward_1", "critic", "reward", "actor", "critic", "reference"]
    assert training(given) == ("actor", "critic")
    assert scoring(given) == ("critic", "reference", "reward_1", "reward")
    assert role_of("reward_1") == role_of("reward") != role_of("reference")


def test_what_each_model_says_is_kept_by_its_role() -> None:
    logprobs = np.zeros(2, np.float32)
    first, second = inferences({"reference": [logprobs] * 2, "reward": [1.0, 2.0], "reward_1": [3.0, 4.0]})
    assert (first.scores, second.scores) == ({"reward": 1.0, "reward_1": 3.0}, {"reward": 2.0, "reward_1": 4.0})
    assert first.reference_logprobs is logprobs
    assert first.values is None
    sample, unscored = (Sample(index, (1,), state=SampleState.INFERRING, score=9.0) for index in range(2))
    apply_inference([sample, unscored], [second, *inferences({"reference": [logprobs]})])
    assert (sample.scores, sample.score) == (second.scores, 6.0)
    assert (unscored.scores, unscored.score) == (None, 9.0)


def test_each_model_reads_its_own_tokens() -> None:
    sequence = TokenSequence((1, 2), (3,), {"reward_1": ((7, 8), (9,))})
    assert sequence.read_by("reward") is sequence
    assert sequence.read_by("reward_1") == TokenSequence((7, 8), (9,))
