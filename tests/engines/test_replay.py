"""The replay engine's own promises."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fuse.engines.engine import GeneratedToken, GenerationRequest, SamplingParams
from fuse.engines.replay import ReplayEngine

STOP = 9
REQUEST = GenerationRequest(
    sample_id=0,
    prompt_ids=(1, 2),
    params=SamplingParams(seed=0, temperature=1.0, max_new_tokens=5, stop_token_ids=(STOP,)),
)
RECORDINGS = {0: ([4, STOP, 6], [-1.0, -2.0, -3.0])}


def test_tokens_after_a_stop_token_are_replayed() -> None:
    engine = ReplayEngine(RECORDINGS)
    engine.submit(REQUEST)
    assert [engine.step() for _ in range(4)] == [
        [GeneratedToken(0, 4, -1.0, False)],
        [GeneratedToken(0, STOP, -2.0, False)],
        [GeneratedToken(0, 6, -3.0, True)],
        [],
    ]


def test_a_sample_that_was_not_recorded_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 3 was not recorded"):
        ReplayEngine(RECORDINGS).submit(replace(REQUEST, sample_id=3))


def test_a_recording_beyond_the_limit_is_refused() -> None:
    short = replace(REQUEST, params=replace(REQUEST.params, max_new_tokens=2))
    with pytest.raises(ValueError, match="more than max_new_tokens=2"):
        ReplayEngine(RECORDINGS).submit(short)


def test_tokens_that_are_not_in_the_recording_are_refused() -> None:
    with pytest.raises(ValueError, match="not a proper beginning"):
        ReplayEngine(RECORDINGS).submit(replace(REQUEST, response_ids=(5,), logprobs=(-1.0,)))


@pytest.mark.parametrize("recording", [([], []), ([1, 2], [-1.0])])
def test_a_malformed_recording_is_refused(recording: tuple[list[int], list[float]]) -> None:
    with pytest.raises(ValueError, match="the recording of sample 0"):
        ReplayEngine({0: recording})
