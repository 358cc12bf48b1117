"""Samples of random prompts, and their generation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fuse.benchmarks.gpu.setup import Setup
from fuse.engines.engine import GenerationEngine, GenerationRequest, SamplingParams

Generated = dict[int, tuple[list[int], list[float]]]
"""Tokens and their log-probabilities, by sample id."""


def requests_of(setup: Setup, count: int, response_tokens: int, *, first_id: int = 0) -> list[GenerationRequest]:
    """Another prompt for every sample; responses end at that length."""
    drawn = np.random.default_rng(first_id).integers(0, setup.model.vocab_size, (count, setup.prompt_tokens))
    params = SamplingParams(seed=0, temperature=1.0, max_new_tokens=response_tokens)
    return [
        GenerationRequest(sample_id=first_id + index, prompt_ids=tuple(prompt), params=params)
        for index, prompt in enumerate(drawn.tolist())
    ]


def generate(engine: GenerationEngine, requests: Sequence[GenerationRequest]) -> Generated:
    """All responses."""
    generated: Generated = {request.sample_id: ([], []) for request in requests}
    for request in requests:
        engine.submit(request)
    while tokens := engine.step():
        for token in tokens:
            ids, logprobs = generated[token.sample_id]
            ids.append(token.token_id)
            logprobs.append(token.logprob)
    return generated
