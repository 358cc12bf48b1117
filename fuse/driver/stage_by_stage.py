"""Stage by stage: all samples are generated, then all are scored. The baseline that fused policies must beat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

from fuse.activity import silent
from fuse.driver.score_flow import score_through
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.interstage.dealing import Dealing
from fuse.interstage.migration import balance
from fuse.roles import GENERATING
from fuse.sample import Sample, SampleState, response_length
from fuse.training.reading import TokenSequence
from fuse.training.scoring import Inference, inferences
from fuse.workers.calls import Future, gather, wait_ended
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import Progress
from fuse.workers.model_handle import ModelHandle

_POLL_TIMEOUT_S = 1.0
_GATHER_S = 0.25
"""Samples that finish so shortly after one another are told of together: nobody waits for them."""
WAIT_S = 5.0
"""Between two looks at who has been silent, where nobody answers."""


def generate(
    engines: Sequence[GenerationHandle],
    samples: Sequence[Sample],
    params: SamplingParams,
    pad_token_id: int | None,
    tell: Callable[[str], None] = silent,
    *,
    max_new_tokens: Mapping[int, int] | None = None,
    dealing: Dealing | None = None,
    timeout_s: float = math.inf,
) -> None:
    """Fill in every sample's response; each engine keeps its samples to the end.

    tell: hears how far it is. max_new_tokens: by sample id, in place of that of `params`. dealing: which samples each
    engine gets. timeout_s: an engine without a token for so long counts as lost.

    Raises:
        WorkerError: an engine died, raised or was silent.
    """
    by_id = {sample.id: sample for sample in samples}
    shares = dict(zip(engines, (dealing or Dealing()).shares(samples, len(engines)), strict=True))
    limits = max_new_tokens or {}
    gather([engine.submit([request_of(one, params, limits) for one in share]) for engine, share in shares.items()])
    for sample in samples:
        sample.advance(SampleState.GENERATING)

    remaining = {engine: len(share) for engine, share in shares.items()}
    heard_s = dict.fromkeys(engines, time.monotonic())
    polls: dict[Future[list[Progress]], GenerationHandle] = {
        engine.poll(_POLL_TIMEOUT_S, _GATHER_S): engine for engine, count in remaining.items() if count
    }
    while polls:
        for future in wait_ended(list(polls), WAIT_S):
            engine = polls.pop(future)
            if reports := future.result():
                heard_s[engine] = time.monotonic()
            for progress in reports:
                remaining[engine] -= apply_progress(by_id[progress.sample_id], progress, params, pad_token_id)
            if remaining[engine]:
                polls[engine.poll(_POLL_TIMEOUT_S, _GATHER_S)] = engine
        tell(progress_text(samples))
        for engine in polls.values():
            if time.monotonic() - heard_s[engine] > timeout_s:
                raise WorkerError(engine.worker.device, engine.worker.role, f"no token within {timeout_s:g} s")


def infer(
    scorers: Sequence[ModelHandle],
    samples: Sequence[Sample],
    *,
    flow_roles: Sequence[str] = (),
    timeout_s: float | None = None,
) -> None:
    """Fill in what models say of every sample; devices get equal shares of the tokens.

    flow_roles: as of `LiveRollout`; the shares then follow one another through the pipelines.

    Raises:
        WorkerError: a model worker died, raised, or did not answer within `timeout_s`.
    """
    tokens = [len(sample.prompt_ids) + sample.length for sample in samples]
    shares = [[samples[index] for index in share] for share in balance(tokens, len(scorers)) if share]
    for sample in samples:
        sample.advance(SampleState.INFERRING)
    pieces = [[sequence_of(sample) for sample in share] for share in shares]
    if flow_roles:
        found = [inferences(one) for one in score_through(scorers, flow_roles, pieces, timeout_s)]
    else:
        found = gather([scorer.infer(one) for scorer, one in zip(scorers, pieces, strict=False)], timeout_s)
    for share, results in zip(shares, found, strict=True):
        apply_inference(share, results)


def recompute_logprobs(scorers: Sequence[ModelHandle], samples: Sequence[Sample], timeout_s: float | None) -> None:
    """Fill in log-probabilities of the samples' tokens as the actor's training stages compute them now.

    Raises:
        WorkerError: a model worker died, raised, or did not answer within `timeout_s`.
    """
    sequences = [sequence_of(sample) for sample in samples]
    (found,) = score_through(scorers, (GENERATING,), [sequences], timeout_s)
    for sample, logprobs in zip(samples, found[GENERATING], strict=True):
        sample.trainer_logprobs = logprobs


def progress_text(samples: Sequence[Sample]) -> str:
    """How far a rollout is, for people."""
    states = [sample.state for sample in samples]
    num_live = sum(state in _LIVE for state in states)
    if not num_live:
        return f"scoring: {states.count(SampleState.SCORED)} of {len(samples)} samples"
    num_tokens = sum(len(sample.response_ids) for sample in samples)
    return f"generating: {len(samples) - num_live} of {len(samples)} samples, {num_tokens:,} tokens"


_LIVE = frozenset({SampleState.QUEUED, SampleState.GENERATING, SampleState.MIGRATING})


def request_of(sample: Sample, params: SamplingParams, max_new_tokens: Mapping[int, int]) -> GenerationRequest:
    """What an engine is given, with the tokens that there are already. max_new_tokens: see `generate`."""
    most = max_new_tokens.get(sample.id, params.max_new_tokens)
    return GenerationRequest(
        sample_id=sample.id,
        prompt_ids=sample.prompt_ids,
        params=replace(params, max_new_tokens=most),
        response_ids=tuple(sample.response_ids),
        logprobs=tuple(sample.logprobs),
    )


def sequence_of(sample: Sample) -> TokenSequence:
    """What models score: the prompt, and the response as far as it counts."""
    return TokenSequence(sample.prompt_ids, tuple(sample.response_ids[: sample.length]), sample.rewarded_ids, sample.id)


def apply_progress(sample: Sample, progress: Progress, params: SamplingParams, pad_token_id: int | None) -> bool:
    """Write down a live sample's new tokens; returns whether it is finished."""
    sample.response_ids[progress.position :] = progress.token_ids
    sample.logprobs[progress.position :] = progress.logprobs
    if progress.finished:
        sample.length = response_length(sample.response_ids, params.stop_token_ids, pad_token_id)
        sample.advance(SampleState.GENERATED)
    return progress.finished


def apply_inference(samples: Sequence[Sample], results: Sequence[Inference]) -> None:
    """Write down what the models say; a score from elsewhere stays where there is no reward model, several add up."""
    for sample, result in zip(samples, results, strict=True):
        for field in fields(result):
            if (said := getattr(result, field.name)) is not None:
                setattr(sample, field.name, said)
        if result.scores is not None:
            sample.score = sum(result.scores.values())
        sample.advance(SampleState.SCORED)


def skip_inference(samples: Sequence[Sample]) -> None:
    """No model has anything to say."""
    for sample in samples:
        sample.advance(SampleState.INFERRING)
        sample.advance(SampleState.SCORED)
