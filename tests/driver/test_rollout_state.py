"""What a policy sees of a live rollout."""

from __future__ import annotations

import numpy as np

from fuse.driver.rollout_state import RolloutDevice, visible_state
from fuse.interstage.migration import EngineLimits
from fuse.sample import Sample, SampleState

LIMITS = EngineLimits(max_batch=8, kv_capacity_tokens=100, max_new_tokens=10)


def test_ended_samples_stay_in_sight_when_they_are_scored() -> None:
    """They tell of siblings to the end; the tokens are those that were decoded, not those that count."""
    states = [SampleState.GENERATING, SampleState.GENERATED, SampleState.SCORED]
    samples = [
        Sample(10 + index, (1, 2), state=state, response_ids=[0] * (3 + index), length=1)
        for index, state in enumerate(states)
    ]
    seen = visible_state(samples, np.array([4, 4, 0]), {10: 0}, [RolloutDevice(0, None)], LIMITS)
    assert (seen.live.ids.tolist(), seen.live.prompts.tolist()) == ([0], [4])
    assert (seen.ended.prompts.tolist(), seen.ended.response_tokens.tolist()) == ([4, 0], [4, 5])
    assert seen.finished_ids.tolist() == [1]
    over = visible_state(samples, np.array([4, 4, 0]), {}, [RolloutDevice(0, None)], LIMITS)
    assert over.ended.response_tokens.tolist() == [3, 4, 5]
    assert not len(over.live)
