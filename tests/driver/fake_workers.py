"""Workers whose calls end in an order drawn at random, and whose engines may die: what a live rollout must survive."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fuse.driver.live import LiveRollout
from fuse.engines.engine import Evicted, GenerationEngine, GenerationRequest
from fuse.training.reading import TokenSequence
from fuse.training.score_pipelines import Piece, Scored
from fuse.training.scoring import Inference
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import Departure, Progress
from fuse.workers.model_handle import ModelHandle


def token(sample_id: int, position: int) -> int:
    return 10 + (7 * sample_id + 3 * position) % 50


class FakeFuture:
    """method: the name."""

    def __init__(self, worker: FakeWorker, method: str, args: tuple[Any, ...]) -> None:
        self.worker, self.method, self.args = worker, method, args
        self.error: WorkerError | None = None
        self.value: Any = None

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class FakeWorker:
    """What handles call: calls but polls run in order, when `Chance` says so; those of a dead worker fail."""

    def __init__(self, role: str, device: int) -> None:
        self.role, self.device = role, device
        self.queue: deque[FakeFuture] = deque()
        self.is_dead = False

    def kill(self) -> None:
        self.is_dead = True

    def call(self, method: Callable[..., Any], *args: Any) -> FakeFuture:
        future = FakeFuture(self, method.__name__, args)
        if future.method != "poll":
            self.queue.append(future)
        return future

    def run(self, future: FakeFuture, random: np.random.Generator) -> None:
        if future.method != "poll":
            assert self.queue.popleft() is future
        if self.is_dead:
            future.error = WorkerError(self.device, self.role, "its process died", is_death=True)
        elif future.method == "poll":
            future.value = self.poll(random)
        else:
            future.value = getattr(self, future.method)(*future.args)

    def poll(self, random: np.random.Generator) -> Any:
        raise AssertionError("only engines are polled")


class FakeEngine(FakeWorker):
    """A sample has `lengths[id]` tokens; between two polls the engine takes some steps."""

    def __init__(self, device: int, lengths: Mapping[int, int], max_batch: int) -> None:
        super().__init__("generation worker", device)
        self.lengths, self.max_batch = lengths, max_batch
        self.is_silent = False  # a hung one, which answers and gets nothing done
        self.samples: dict[int, GenerationRequest] = {}
        self.tokens: dict[int, list[int]] = {}
        self.reported: dict[int, int] = {}

    @property
    def handle(self) -> GenerationHandle:
        worker: Any = self
        return GenerationHandle(worker)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        for request in requests:
            assert request.sample_id not in self.samples, "a sample is on an engine twice"
            known = list(request.response_ids)
            assert known == [token(request.sample_id, position) for position in range(len(known))]
            assert len(known) < self.lengths[request.sample_id], "a finished sample was submitted"
            self.samples[request.sample_id], self.tokens[request.sample_id] = request, known
            self.reported[request.sample_id] = len(known)

    def admit(self, departures: Sequence[Departure]) -> None:
        self.submit([departure.request for departure in departures])

    def evict(self, sample_ids: Sequence[int], with_kv: bool) -> list[Departure]:
        departures = []
        for sample_id in sample_ids:
            if sample_id in self.samples and len(self.tokens[sample_id]) < self.lengths[sample_id]:
                request = self.samples.pop(sample_id)
                ids = tuple(self.tokens.pop(sample_id))
                departures.append(Departure(_with_response(request, ids)))
        return departures

    def poll(self, random: np.random.Generator) -> list[Progress]:
        for _ in range(0 if self.is_silent else int(random.integers(0, 4))):
            running = [one for one in self.samples if len(self.tokens[one]) < self.lengths[one]][: self.max_batch]
            for one in running:
                self.tokens[one].append(token(one, len(self.tokens[one])))
        progress = []
        for one in list(self.samples):
            start, tokens = self.reported[one], self.tokens[one]
            if len(tokens) > start:
                finished = len(tokens) == self.lengths[one]
                ids = tuple(tokens[start:])
                progress.append(Progress(one, start, ids, tuple(-float(each) for each in ids), finished))
                self.reported[one] = len(tokens)
                if finished:
                    del self.samples[one], self.tokens[one]
        return progress


@dataclass(frozen=True, slots=True)
class CarriedKV:
    """A `KVRef` within the process."""

    tensors: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class ServedEngine(FakeWorker):
    """A real engine in this process; between two polls it takes some steps.

    samples: live ones, by their number of response tokens.
    """

    def __init__(self, device: int, engine: GenerationEngine) -> None:
        super().__init__("generation worker", device)
        self.engine = engine
        self.samples: dict[int, int] = {}
        self.num_with_kv = 0

    @property
    def handle(self) -> GenerationHandle:
        worker: Any = self
        return GenerationHandle(worker)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self.admit([Departure(request) for request in requests])

    def admit(self, departures: Sequence[Departure]) -> None:
        for departure in departures:
            kv: Any = departure.kv
            self.engine.admit(Evicted(departure.request, None if kv is None else kv.tensors))
            self.samples[departure.request.sample_id] = len(departure.request.response_ids)
            self.num_with_kv += kv is not None

    def evict(self, sample_ids: Sequence[int], with_kv: bool) -> list[Departure]:
        departures = []
        for sample_id in sample_ids:
            if sample_id in self.samples:
                del self.samples[sample_id]
                evicted = self.engine.evict(sample_id, with_kv=with_kv)
                kv: Any = None if evicted.kv is None else CarriedKV(evicted.kv)
                departures.append(Departure(evicted.request, kv))
        return departures

    def poll(self, random: np.random.Generator) -> list[Progress]:
        steps = [self.engine.step() for _ in range(int(random.integers(0, 4)))]
        progress = []
        for one in [one for step in steps for one in step]:
            progress.append(
                Progress(one.sample_id, self.samples[one.sample_id], (one.token_id,), (one.logprob,), one.finished)
            )
            self.samples[one.sample_id] += 1
            if one.finished:
                del self.samples[one.sample_id]
        return progress


class FakeScorer(FakeWorker):
    """Scores a sequence with its number of tokens; asserts that its device's engine is empty meanwhile."""

    def __init__(self, device: int, engine: FakeEngine | ServedEngine) -> None:
        super().__init__("model worker", device)
        self.engine = engine
        self.pieces: list[Piece | None] = []

    @property
    def handle(self) -> ModelHandle:
        worker: Any = self
        return ModelHandle(worker)

    def infer(self, sequences: Sequence[TokenSequence]) -> list[Inference]:
        assert self.engine.is_dead or not self.engine.samples, "the device decodes while it scores"
        return [
            Inference(
                reference_logprobs=np.zeros(len(one.response_ids), np.float32),
                values=np.zeros(1, np.float32),
                scores={"reward": float(len(one))},
            )
            for one in sequences
        ]

    def advance(self, piece: Piece | None) -> list[Scored]:
        """A device in pipelines that says at once what the critic does, and the others a call later, on odd devices."""
        self.pieces.append(piece)
        if self.device % 2 == 0:
            return [] if piece is None else [self._scored(piece, "critic", np.zeros(1, np.float32))]
        before = self.pieces[-2] if len(self.pieces) > 1 else None
        return [] if before is None else self.of_others(before)

    def of_others(self, piece: Piece) -> list[Scored]:
        """By two calls' worth of answers: half of the sequences each."""
        scores = [float(len(one)) for one in piece.sequences]
        logprobs = [np.zeros(len(one.response_ids), np.float32) for one in piece.sequences]
        halves = [tuple(range(first, len(scores), 2)) for first in range(2)]
        return [
            Scored(piece.number, role, half, tuple(said[index] for index in half))
            for half in halves
            for role, said in (("reward", scores), ("reference", logprobs))
        ]

    @staticmethod
    def _scored(piece: Piece, role: str, of_each: Any) -> Scored:
        count = len(piece.sequences)
        return Scored(piece.number, role, tuple(range(count)), (of_each,) * count)


FLOW_ROLES = ("critic", "reference", "reward")


class Chance:
    """Waits for calls in place of `PendingCalls`: some end, and now and then an engine dies."""

    def __init__(self, seed: int, engines: Sequence[FakeWorker], num_deaths: int, death_rate: float) -> None:
        self.random = np.random.default_rng(seed)
        self.engines, self.num_deaths, self.death_rate = engines, num_deaths, death_rate
        self.pending: dict[FakeFuture, Callable[[], None]] = {}

    def __len__(self) -> int:
        return len(self.pending)

    def expect(self, future: FakeFuture, then: Callable[[], None]) -> None:
        self.pending[future] = then

    def heard(self, timeout_s: float) -> list[Callable[[], None]]:
        futures = list(self.pending)
        assert futures, "the rollout waits for nothing"
        if self.num_deaths and self.random.random() < self.death_rate:
            self.num_deaths -= 1
            self.engines[int(self.random.integers(len(self.engines)))].is_dead = True
        ended: list[FakeFuture] = []
        while not ended:
            for index in self.random.permutation(len(futures)):
                future = futures[index]
                is_next = future not in ended and (future.method == "poll" or future.worker.queue[0] is future)
                if is_next and self.random.random() < 0.4:
                    future.worker.run(future, self.random)
                    ended.append(future)
        return [self.pending.pop(future) for future in futures if future in ended]


def use_chance(rollout: LiveRollout, chance: Any) -> None:
    """Have the rollout wait for fake calls."""
    rollout._pending = chance


def _with_response(request: GenerationRequest, ids: tuple[int, ...]) -> GenerationRequest:
    return GenerationRequest(
        sample_id=request.sample_id,
        prompt_ids=request.prompt_ids,
        params=request.params,
        response_ids=ids,
        logprobs=tuple(-float(each) for each in ids),
    )
