"""The decode loop on a deterministic engine: in this process, and as an actor for what only a process can show."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fuse.engines.engine import Evicted, GeneratedToken, GenerationRequest, SamplingParams
from fuse.engines.kv_memory import Allocate
from fuse.engines.replay import ReplayEngine
from fuse.state_dict import Weights, WeightStream
from fuse.workers.calls import gather, wait_ended
from fuse.workers.carriers.parcel import Parcel
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import GenerationWorker, Progress
from fuse.workers.kv.transfer import ObjectStoreTransfer
from fuse.workers.weight_port import WeightSender

from .giving import give

PATIENCE_S = 300.0
PARAMS = SamplingParams(seed=0, temperature=1.0, max_new_tokens=1_000_000)


def request(sample_id: int, response_ids: tuple[int, ...] = ()) -> GenerationRequest:
    logprobs = tuple(-float(token) for token in response_ids)
    return GenerationRequest(
        sample_id=sample_id, prompt_ids=(1, 2), params=PARAMS, response_ids=response_ids, logprobs=logprobs
    )


def recordings(*lengths: int) -> dict[int, tuple[list[int], list[float]]]:
    """Sample i's tokens are 0, 1, 2, ... and their log-probabilities the negative."""
    return {i: (list(range(length)), [-float(token) for token in range(length)]) for i, length in enumerate(lengths)}


class SteppedEngine(ReplayEngine):
    """Takes a step only when the test allows one."""

    def __init__(self, *lengths: int) -> None:
        super().__init__(recordings(*lengths))
        self.permits = threading.Semaphore(0)

    def step(self) -> list[GeneratedToken]:
        assert self.permits.acquire(timeout=PATIENCE_S)
        return super().step()

    def allow(self, num_steps: int) -> None:
        self.permits.release(num_steps)


class SharingEngine(ReplayEngine):
    """Says that it has computed the first sample's prompt alone."""

    def step(self) -> list[GeneratedToken]:
        return [
            replace(token, shared_tokens=1) if token.sample_id and not token.token_id else token
            for token in super().step()
        ]


class DraftingEngine(ReplayEngine):
    """Two tokens of each sample in a step, the first of which was drafted, with one that was wrong."""

    def step(self) -> list[GeneratedToken]:
        first = [replace(token, drafted_tokens=2, draft_s=0.25, drafted_in_window=True) for token in super().step()]
        return sorted([*first, *super().step()], key=lambda token: token.sample_id)


class CountingEngine(ReplayEngine):
    """Tells when it has taken so many steps."""

    def __init__(self, num_steps: int) -> None:
        super().__init__(recordings(num_steps))
        self.left, self.done = num_steps, threading.Event()

    def step(self) -> list[GeneratedToken]:
        tokens = super().step()
        self.left -= 1
        if not self.left:
            self.done.set()
        return tokens


class BrokenEngine(ReplayEngine):
    def step(self) -> list[GeneratedToken]:
        raise RuntimeError("the engine broke")


class NoMemory(ObjectStoreTransfer):
    """A carrier on a device that is full."""

    @staticmethod
    def allocate(num_bytes: int) -> Tensor:
        raise torch.OutOfMemoryError("the device is full")


class KvEngine(ReplayEngine):
    """Has KV, of a kind, and needs memory to give it away."""

    def evict(self, sample_id: int, *, with_kv: bool = False, allocate: Allocate | None = None) -> Evicted:
        if with_kv:
            assert allocate is not None
            allocate(8)
        return super().evict(sample_id)


Make = Callable[[ReplayEngine], GenerationWorker]


@pytest.fixture
def make() -> Iterator[Make]:
    made = []

    def make(engine: ReplayEngine) -> GenerationWorker:
        made.append((engine, GenerationWorker(lambda: engine, ObjectStoreTransfer)))
        return made[-1][1]

    yield make
    for engine, worker in made:
        if isinstance(engine, SteppedEngine):
            engine.allow(100_000)
        if worker._failure is None:
            worker.close()


def collect(worker: GenerationWorker, num_finished: int) -> dict[int, list[int]]:
    responses: dict[int, list[int]] = {}
    while num_finished:
        for one in worker.poll(PATIENCE_S):
            response = responses.setdefault(one.sample_id, [])
            assert one.position == len(response)
            assert one.logprobs == tuple(-float(token) for token in one.token_ids)
            response += one.token_ids
            num_finished -= one.finished
    return responses


def test_every_token_is_reported_once_and_in_order(make: Make) -> None:
    lengths = (5, 1, 90, 17)
    worker = make(ReplayEngine(recordings(*lengths), max_batch=2))
    worker.submit([request(0), request(1)])
    worker.submit([request(2), request(3)])
    assert collect(worker, 4) == {i: list(range(length)) for i, length in enumerate(lengths)}
    assert worker.poll(0.0) == []


def test_a_finished_sample_is_reported_at_once_with_the_tokens_of_the_others(make: Make) -> None:
    engine = SteppedEngine(2, 6)
    worker = make(engine)
    worker.submit([request(0), request(1)])
    assert worker.poll(0.0) == [], "no step was taken"
    engine.allow(2)
    assert worker.poll(PATIENCE_S) == [
        Progress(0, 0, (0, 1), (0.0, -1.0), True),
        Progress(1, 0, (0, 1), (0.0, -1.0), False),
    ]
    engine.allow(4)
    assert worker.poll(PATIENCE_S) == [Progress(1, 2, (2, 3, 4, 5), (-2.0, -3.0, -4.0, -5.0), True)]


def test_those_that_finish_soon_after_another_are_reported_with_it(make: Make) -> None:
    """Until one is left, which may take for long."""
    engine = SteppedEngine(2, 4, 9)
    worker = make(engine)
    worker.submit([request(0), request(1), request(2)])
    with ThreadPoolExecutor() as threads:
        polled = threads.submit(worker.poll, PATIENCE_S, PATIENCE_S)
        engine.allow(2)
        assert not wait([polled], timeout=0.05).done
        engine.allow(2)
        assert [one.finished for one in polled.result(PATIENCE_S)] == [True, True, False]


def test_unfinished_samples_are_reported_when_the_time_is_up(make: Make) -> None:
    engine = SteppedEngine(9)
    worker = make(engine)
    worker.submit([request(0)])
    engine.allow(3)
    reported: list[int] = []
    while len(reported) < 3:
        (*progress,) = worker.poll(0.01)
        assert [(one.sample_id, one.position, one.finished) for one in progress] in ([], [(0, len(reported), False)])
        reported += [token for one in progress for token in one.token_ids]
    assert reported == [0, 1, 2]


def test_the_loop_decodes_while_nobody_polls(make: Make) -> None:
    engine = CountingEngine(500)
    worker = make(engine)
    worker.submit([request(0)])
    assert engine.done.wait(PATIENCE_S)
    (only,) = worker.poll(PATIENCE_S)
    assert (len(only.token_ids), only.finished) == (500, True)


class ToldQueue(queue.SimpleQueue[Any]):
    """Tells when something was put in."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self.told.set()


def test_an_evicted_sample_carries_its_tokens_and_continues_elsewhere(make: Make) -> None:
    engine = SteppedEngine(5, 1, 8)
    first, second = make(engine), make(ReplayEngine(recordings(5, 1, 8)))
    first.submit([request(0), request(1), request(2)])
    engine.allow(1)
    finished = first.poll(PATIENCE_S)
    assert [one.sample_id for one in finished if one.finished] == [1]
    first._commands = commands = ToldQueue()  # the loop looks there between any two steps
    with ThreadPoolExecutor() as threads:
        eviction = threads.submit(first.evict, [0, 1])
        assert commands.told.wait(PATIENCE_S)
        engine.allow(1)
        evicted = eviction.result()
    assert [one.request.sample_id for one in evicted] == [0], "sample 1 has finished"
    num_tokens = len(evicted[0].request.response_ids)
    assert num_tokens in (1, 2)
    second.admit(evicted)
    (rest,) = second.poll(PATIENCE_S)
    assert (rest.sample_id, rest.position, rest.finished) == (0, num_tokens, True)
    assert evicted[0].request.response_ids + rest.token_ids == tuple(range(5))
    engine.allow(10)
    (left,) = first.poll(PATIENCE_S)
    assert (left.sample_id, left.finished) == (2, True), "the evicted sample is reported no more"


def test_a_sample_whose_kv_finds_no_memory_leaves_without_it(caplog: pytest.LogCaptureFixture) -> None:
    worker = GenerationWorker(lambda: KvEngine(recordings(1_000_000)), NoMemory)
    worker.submit([request(0)])
    (departure,) = worker.evict([0], with_kv=True)
    assert departure.kv is None
    assert "no memory for the KV of sample 0, which moves without it: the device is full" in caplog.text
    worker.close()


def test_spans_tell_batch_and_time_of_every_step(make: Make) -> None:
    worker = make(ReplayEngine(recordings(3, 2)))
    worker.submit([request(0), request(1)])
    collect(worker, 2)
    *recorded, usage = worker.drain_spans()
    spans = [span for span in recorded if span.category == "generate"]
    assert [span.arguments["batch"] for span in spans] == [2, 2, 1]
    assert all(before.end_s <= after.start_s for before, after in pairwise(spans))
    stays = {span.arguments["sample"]: span for span in recorded if span not in spans}
    assert {sample: (span.start_s, span.arguments["tokens"]) for sample, span in stays.items()} == {
        0: (spans[0].start_s, 3),
        1: (spans[0].start_s, 2),
    }
    assert usage.arguments["bytes"] > 2**20
    assert [span.category for span in worker.drain_spans()] == ["usage"]


def test_spans_tell_computed_tokens_from_shared_ones(make: Make) -> None:
    """Of two samples with prompts of two tokens, one of which an engine had; then of one more."""
    worker = make(SharingEngine(recordings(3, 2, 1), max_batch=2))
    worker.submit([request(0), request(1), request(2)])
    collect(worker, 3)
    sizes = [span.arguments for span in worker.drain_spans() if span.category == "generate"]
    assert [one["prefill_tokens"] for one in sizes] == [3, 0, 1]
    assert [one["shared_tokens"] for one in sizes] == [1, 0, 1]


def test_spans_tell_samples_from_tokens_and_drafted_ones(make: Make) -> None:
    """Of samples of 4 and 6 tokens; context is that before the step."""
    worker = make(DraftingEngine(recordings(4, 6)))
    worker.submit([request(0), request(1)])
    assert {len(response) for response in collect(worker, 2).values()} == {4, 6}
    sizes = [span.arguments for span in worker.drain_spans() if span.category == "generate"]
    assert [one["batch"] for one in sizes] == [2, 2, 1]
    assert [one["tokens"] for one in sizes] == [4, 4, 2]
    assert [one["drafted_tokens"] for one in sizes] == [4, 4, 2]
    assert [one["draft_steps"] for one in sizes] == [2, 2, 2]
    assert [one["tried_tokens"] for one in sizes] == [4, 4, 2], "the second one was wrong"
    assert [one["draft_s"] for one in sizes] == [0.25] * 3, "of the step, and not of each sample"
    assert [one["drafted_in_window"] for one in sizes] == [True] * 3
    assert [one["context_tokens"] for one in sizes] == [4, 8, 6]


def test_what_the_engine_raises_is_raised_by_the_next_call_and_all_after(make: Make) -> None:
    worker = make(BrokenEngine(recordings(3)))
    worker.submit([request(0)])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the engine broke"):
            worker.poll(PATIENCE_S)
    for call in (partial(worker.submit, []), partial(worker.evict, [0]), worker.drain_spans):
        with pytest.raises(RuntimeError, match="the engine broke"):
            call()


def test_a_request_that_the_engine_refuses_is_raised(make: Make) -> None:
    worker = make(ReplayEngine(recordings(3)))
    worker.submit([request(7)])
    with pytest.raises(ValueError, match="sample 7 was not recorded"):
        worker.poll(PATIENCE_S)


def test_closing_drops_what_is_live_and_can_be_repeated() -> None:
    engine = SteppedEngine(5)
    engine.allow(100_000)
    worker = GenerationWorker(lambda: engine, ObjectStoreTransfer)
    worker.submit([request(0)])
    worker.close()
    worker.close()
    assert not worker._loop.is_alive()


def test_one_driver_follows_many_workers(cluster: Cluster) -> None:
    engines = [
        GenerationHandle.spawn(cluster, device, partial(ReplayEngine, recordings(30, 4, 11)), ObjectStoreTransfer)
        for device in (0, 1)
    ]
    gather([engine.submit([request(0), request(1), request(2)]) for engine in engines])
    polls = {engine.poll(1000.0): engine for engine in engines}
    finished: list[tuple[int, int]] = []
    while len(finished) < 6:
        for future in wait_ended(list(polls)):
            engine = polls.pop(future)
            finished += [(engine.worker.device, one.sample_id) for one in future.result() if one.finished]
            polls[engine.poll(1000.0)] = engine  # comes back at once when the engine is empty
    assert sorted(finished) == [(device, sample_id) for device in (0, 1) for sample_id in (0, 1, 2)]

    gather([engines[0].submit([request(3)])])  # polls do not wait for it: they run beside other calls
    with pytest.raises(WorkerError, match=r"^generation worker on device 0 failed: ValueError: sample 3 was not rec"):
        gather([engines[0].poll(1000.0)])
    for engine in engines:
        cluster.kill(engine.worker)


WEIGHTS = {f"weight {index}": torch.full((3,), float(index)) for index in range(3)}


def test_weights_are_loaded_into_an_empty_engine_only(cluster: Cluster) -> None:
    engine = GenerationHandle.spawn(cluster, 0, partial(ReplayEngine, recordings(1, 1_000_000)), ObjectStoreTransfer)
    give(engine, WEIGHTS)
    engine.submit([request(0)]).result()
    assert [one.finished for one in engine.poll(1000.0).result()] == [True]
    give(engine, WEIGHTS)
    spans = engine.drain_spans().result()
    assert [span.category for span in spans] == ["weights", "sample", "generate", "weights", "usage"]
    engine.submit([request(1)])
    with pytest.raises(WorkerError, match="ValueError: cannot load weights while 1 samples are in the engine"):
        give(engine, WEIGHTS)
    cluster.kill(engine.worker)


class LoadingEngine(ReplayEngine):
    """Keeps the weights that it is given, and objects to one."""

    def __init__(self) -> None:
        super().__init__(recordings(1))
        self.loaded: list[float] = []

    def load_weights(self, weights: Weights) -> None:
        for name, tensor in WeightStream.of(weights).tensors:
            if name == "bad":
                raise ValueError("this one is bad")
            self.loaded.append(float(tensor))


def parcel_of(**tensors: float) -> Parcel:
    """As from a sender that has ended: what is in it lasts, for it is this process's."""
    sender = WeightSender(
        dict.fromkeys(tensors, torch.Size([])),
        iter([(name, torch.tensor(value)) for name, value in tensors.items()]),
        torch.float32,
        torch.device("cpu"),
        most_bytes=1 << 10,
        is_silent=False,
    )
    parcel = sender.next(None)
    assert parcel is not None
    _senders.append(sender)
    return parcel


_senders: list[WeightSender] = []


@pytest.fixture(autouse=True)
def _senders_close() -> Iterator[None]:
    yield
    while _senders:
        _senders.pop().close()


def test_a_bucket_is_done_with_when_the_engine_has_all_of_it(make: Make) -> None:
    engine = LoadingEngine()
    worker = make(engine)
    worker.begin_weights({})
    worker.load([parcel_of(a=1.0), parcel_of(b=2.0)])
    assert engine.loaded == [1.0, 2.0]
    worker.load([parcel_of(c=3.0)])
    assert engine.loaded == [1.0, 2.0, 3.0]
    worker.end_weights()
    worker.submit([request(0)])
    assert collect(worker, 1) == {0: [0]}


def test_an_engine_that_objects_in_the_middle_ends_the_stream(make: Make) -> None:
    worker = make(LoadingEngine())
    worker.begin_weights({})
    with pytest.raises(ValueError, match="this one is bad"):
        worker.load([parcel_of(a=1.0, bad=2.0)])
    for call in (lambda: worker.load([parcel_of(a=1.0)]), worker.end_weights, lambda: worker.poll(PATIENCE_S)):
        with pytest.raises(ValueError, match="this one is bad"):
            call()


def test_a_worker_can_be_closed_in_the_middle_of_a_stream() -> None:
    worker = GenerationWorker(LoadingEngine, ObjectStoreTransfer)
    worker.begin_weights({})
    worker.load([parcel_of(a=1.0)])
    for _ in range(2):
        worker.close()
    assert not worker._loop.is_alive()
    with pytest.raises(RuntimeError, match="closed before its engine has got all weights"):
        worker.load([parcel_of(b=2.0)])
