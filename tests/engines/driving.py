"""Engines driven by hand, one step at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from fuse.engines.engine import GeneratedToken, GenerationEngine, GenerationRequest

Outputs = dict[int, tuple[list[int], list[float]]]
"""By sample id: the tokens of its response so far, and their log-probabilities."""


def collect(outputs: Outputs, tokens: Iterable[GeneratedToken]) -> None:
    """Add what one step gave."""
    for token in tokens:
        response_ids, logprobs = outputs.setdefault(token.sample_id, ([], []))
        response_ids.append(token.token_id)
        logprobs.append(token.logprob)


def run(
    engine: GenerationEngine, requests: Sequence[GenerationRequest] = (), outputs: Outputs | None = None
) -> Outputs:
    """Submit the requests, and step until the engine is empty; adds to `outputs`."""
    outputs = {} if outputs is None else outputs
    for one in requests:
        engine.submit(one)
    while tokens := engine.step():
        collect(outputs, tokens)
    return outputs


def assert_same(actual: Outputs, expected: Outputs, within: float = 1e-5) -> None:
    """The same tokens, and log-probabilities within so much."""
    assert {sample_id: tokens for sample_id, (tokens, _) in actual.items()} == {
        sample_id: tokens for sample_id, (tokens, _) in expected.items()
    }
    for sample_id, (_, logprobs) in actual.items():
        assert logprobs == pytest.approx(expected[sample_id][1], abs=within)
