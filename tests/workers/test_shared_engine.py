"""A vLLM engine over two devices: the tokens of one over one, new weights in both processes, one death for both."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fuse.driver.engine_choice import VllmFactory
from fuse.driver.engines import Engines
from fuse.engines.engine import GenerationRequest
from fuse.engines.transformers import TransformersEngine
from fuse.training.model_spec import ModelSpec
from fuse.workers import generation_handle
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.kv.transfer import ObjectStoreTransfer
from fuse.workers.weights import put_state_dict

from ..engines.conftest import build
from ..engines.driving import assert_same, run
from ..engines.test_vllm import REQUESTS
from .giving import give
from .holding import HeldUntilOthersCome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm_workers,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def model(seed: int = 0) -> Any:
    return build(hidden_size=128, seed=seed)


@pytest.fixture
def engines(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """The first one is held up in the middle of its samples until one leaves."""
    limits = {"max_batch": 16, "max_context": 96, "num_tokens": 90, "kv_cache_bytes": None}
    settings: Any = SimpleNamespace(
        num_devices=2,
        engine_devices=2,
        accelerator="cpu",
        engine=VllmFactory(None, limits),
        kv_transfer=ObjectStoreTransfer,
    )
    weights = [put_state_dict(model().state_dict())]
    with monkeypatch.context() as patch:
        patch.setattr(generation_handle, "GenerationWorker", HeldUntilOthersCome)
        started = Engines(cluster, settings, ModelSpec.of(model()), weights, lambda: weights)
    yield started
    (engine,) = started.workers
    engine.close().result()
    for worker in engine.processes:
        cluster.kill(worker)


def generated(
    engine: GenerationHandle, requests: Sequence[GenerationRequest]
) -> dict[int, tuple[list[int], list[float]]]:
    """As `driving.run` has it, with what the requests have already."""
    found = {one.sample_id: ([*one.response_ids], [*one.logprobs]) for one in requests}
    num_left = len(found)
    while num_left:
        for progress in engine.poll(1.0).result():
            ids, logprobs = found[progress.sample_id]
            ids[progress.position :], logprobs[progress.position :] = progress.token_ids, progress.logprobs
            num_left -= progress.finished
    return found


def expected(seed: int, requests: Sequence[GenerationRequest]) -> dict[int, tuple[list[int], list[float]]]:
    return run(TransformersEngine(model(seed), max_batch=16, max_context=96, num_tokens=90), requests)


def test_two_devices_generate_the_tokens_of_one(engines: Engines) -> None:
    """Also of a sample that leaves in the middle, with its tokens alone; of new weights; and when a process died."""
    (engine,) = engines.workers
    assert len(set(engines.process_ids)) == 2
    unending = replace(REQUESTS[0].params, stop_token_ids=(), max_new_tokens=96 - len(REQUESTS[0].prompt_ids))
    requests = [replace(REQUESTS[0], params=unending), *REQUESTS[1:]]
    _, second = engines.process_ids
    engine.submit(requests).result()
    (departure,) = engine.evict([requests[0].sample_id], with_kv=True).result()
    assert departure.kv is None
    engine.admit([departure]).result()
    assert_same(generated(engine, [departure.request, *requests[1:]]), expected(0, requests))

    few = REQUESTS[5:7]
    engines.call(GenerationHandle.sleep)
    give(engine, model(1).state_dict(), most_bytes=1 << 16)
    engine.submit(few).result()
    assert_same(generated(engine, few), expected(1, few))

    os.kill(second, signal.SIGSTOP)  # so that the sample has not ended before
    engine.submit([replace(REQUESTS[0], sample_id=99)]).result()
    os.kill(second, signal.SIGKILL)
    with pytest.raises(WorkerError, match="generation worker on device 0 failed: its process died") as error:
        while True:
            engine.poll(1.0).result()
    assert error.value.is_death
    engines.replace(0).submit(few).result()
    assert_same(generated(engines.workers[0], few), expected(0, few))
