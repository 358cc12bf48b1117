"""Filtered samples of one prompt in live rollouts on real engines: whatever moves and dies, the tokens are the same."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from fuse.driver import live
from fuse.driver.live import LiveRollout
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.engines.transformers import TransformersEngine
from fuse.interstage.costs import SMALL_CPU
from fuse.interstage.dealing import Dealing
from fuse.interstage.migration import StageByStage
from fuse.sample import Sample

from .. import tiny_models
from ..engines.driving import Outputs, run
from ..engines.test_shared_prompts import Engine as CountingEngine
from ..examples import examples
from .fake_workers import Chance, FakeScorer, ServedEngine, use_chance
from .test_live import LIMITS, MAX_NEW_TOKENS, Wanderlust

PARAMS = SamplingParams(
    seed=0, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=(5,), top_k=30, top_p=0.95, min_p=0.01,
    repetition_penalty=1.2,
)  # fmt: skip
PROMPTS = {index: tuple(range(1, 20)) if index % 3 else (5, 6, 7) for index in range(14)}
FREE_TRANSFERS = replace(SMALL_CPU, transfer_s=0.0, transfer_byte_s=0.0)


def model() -> PreTrainedModel:
    kind = tiny_models.language_model(
        "llama", vocab_size=97, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    built: PreTrainedModel = tiny_models.build(kind)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return built.eval()


@pytest.fixture(scope="module")
def policy_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return model()


def engine(policy_model: PreTrainedModel) -> TransformersEngine:
    own = model()
    own.load_state_dict(policy_model.state_dict())
    return TransformersEngine(own, max_batch=5)


@pytest.fixture(scope="module")
def alone(policy_model: PreTrainedModel) -> Outputs:
    """What every prompt gets when an engine has no other sample."""
    lone = engine(policy_model)
    requests = [
        GenerationRequest(sample_id=index, prompt_ids=prompt, params=PARAMS) for index, prompt in PROMPTS.items()
    ]
    responses = {request.sample_id: run(lone, [request])[request.sample_id] for request in requests}
    request = replace(requests[0], params=replace(PARAMS, top_k=0, top_p=1.0, min_p=None, repetition_penalty=1.0))
    assert run(lone, [request])[0][0] != responses[0][0], "a control: the filters are felt"
    return responses


@pytest.mark.parametrize("moves_kv", [False, True])
@pytest.mark.parametrize("num_deaths", [0, 1])
@pytest.mark.parametrize("seed", range(examples(3)))
def test_filtered_tokens_do_not_depend_on_what_happens(
    policy_model: PreTrainedModel, alone: Outputs, seed: int, num_deaths: int, moves_kv: bool
) -> None:
    workers = [ServedEngine(device, engine(policy_model)) for device in range(2)]
    scorers = [FakeScorer(device, worker).handle for device, worker in enumerate(workers)]
    samples = [Sample(sample_id, prompt_ids) for sample_id, prompt_ids in PROMPTS.items()]
    rollout = LiveRollout(
        [worker.handle for worker in workers],
        lambda: scorers,
        samples,
        PARAMS,
        policy=Wanderlust(np.random.default_rng(seed)),
        limits=LIMITS,
        pad_token_id=0,
        costs=FREE_TRANSFERS if moves_kv else None,
    )
    use_chance(rollout, Chance(seed, workers, num_deaths, 0.15))
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(
            perf_counter=time.perf_counter, monotonic=count().__next__, thread_time=time.thread_time
        )
        patch.setattr(live, "time", clock)
        report = rollout.run()
    assert len(report.lost_engines) == num_deaths
    if not num_deaths:
        assert report.num_migrations > 0
        assert (sum(worker.num_with_kv for worker in workers) > 0) == moves_kv

    for sample in samples:
        token_ids, logprobs = alone[sample.id]
        assert sample.response_ids == token_ids
        assert sample.logprobs == pytest.approx(logprobs, abs=1e-5)


def test_an_engine_computes_the_prompts_of_its_groups_alone(policy_model: PreTrainedModel) -> None:
    """Dealt side by side, siblings have their prompt computed once in all; apart, once by each of the engines."""
    free_prefill = replace(SMALL_CPU, prefill_s=0.0, prefill_token_s=0.0)
    computed, responses = [], []
    for dealing in (None, Dealing(free_prefill, response_tokens=10.0)):
        engines = []
        for _ in range(2):
            own = model()
            own.load_state_dict(policy_model.state_dict())
            engines.append(CountingEngine(own, max_batch=8))
        workers = [ServedEngine(device, one) for device, one in enumerate(engines)]
        for one in engines:
            one.computed = 0
        scorers = [FakeScorer(device, worker).handle for device, worker in enumerate(workers)]
        samples = [Sample(index, tuple(range(1 + index // 4, 20))) for index in range(16)]
        rollout = LiveRollout(
            [worker.handle for worker in workers],
            lambda scorers=scorers: scorers,
            samples,
            PARAMS,
            policy=StageByStage(),
            limits=LIMITS,
            pad_token_id=0,
            dealing=dealing,
        )
        use_chance(rollout, Chance(0, workers, 0, 0.0))
        rollout.run()
        computed.append(sum(one.computed for one in engines))
        responses.append([sample.response_ids for sample in samples])
    once = sum(len(samples[first].prompt_ids) - 1 for first in range(0, 16, 4))
    assert computed == [once, 2 * once]
    assert responses[0] == responses[1]
