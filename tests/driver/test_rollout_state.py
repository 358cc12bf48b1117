"""What a policy sees of a live rollout."""

from __future__ import annotations

import pytest

from fuse.driver.rollout_state import RolloutDevice, SampleTable
from fuse.interstage.costs import SMALL_CPU
from fuse.interstage.migration import EngineLimits, Infer
from fuse.sample import Sample, SampleState

LIMITS = EngineLimits(max_batch=8, kv_capacity_tokens=100, max_new_tokens=10)


def test_ended_samples_stay_in_sight_when_they_are_scored() -> None:
    """They tell of siblings to the end; the tokens are those that were decoded, not those that count."""
    states = [SampleState.GENERATING, SampleState.GENERATED, SampleState.SCORED]
    samples = [
        Sample(10 + index, (1, index // 2), state=state, response_ids=[0] * (3 + index), length=1)
        for index, state in enumerate(states)
    ]
    table = SampleTable(samples)
    seen = table.seen([RolloutDevice(0, None)], LIMITS, None, 0.0)
    assert (seen.live.ids.tolist(), seen.live.prompts.tolist()) == ([0], [0])
    assert (seen.ended.prompts.tolist(), seen.ended.response_tokens.tolist()) == ([0, 1], [4, 5])
    assert seen.finished_ids.tolist() == [1]
    samples[0].state = SampleState.SCORED
    table.update(samples[0])
    over = table.seen([RolloutDevice(0, None)], LIMITS, None, 0.0)
    assert over.ended.response_tokens.tolist() == [3, 4, 5]
    assert not len(over.live)


def test_half_of_a_piece_is_left_or_what_the_costs_say() -> None:
    samples = [Sample(7, (1, 2), state=SampleState.INFERRING, response_ids=[0] * 8, length=8)]
    device = RolloutDevice(0, None, job=Infer(0, (0,)), job_tokens=10, is_scoring=True, scoring_s=3.0)
    table = SampleTable(samples)
    for costs, now_s, left in ((None, 9.0, 5.0), (SMALL_CPU, 3.0, 10.0), (SMALL_CPU, 9.0, 0.0)):
        assert table.seen([device], LIMITS, costs, now_s).inferring_left.tolist() == [left]
    (half,) = table.seen([device], LIMITS, SMALL_CPU, 3.0 + SMALL_CPU.inference(10) / 2).inferring_left
    assert half == pytest.approx(5.0)
