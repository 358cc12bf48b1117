"""Workers of emulated devices on a clock that jumps from one event to the next: a live rollout without processes.

Engines are `EmulatedEngine`, and around them stands what `GenerationWorker` does: commands take effect between two
steps, and a poll ends as soon as a sample has finished.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.emulated.device import EmulatedDevice
from fuse.benchmarks.emulated.engine import EmulatedEngine
from fuse.driver import live
from fuse.driver.live import LiveRollout
from fuse.driver.rollout_state import RolloutReport
from fuse.engines.engine import GeneratedToken, GenerationRequest, SamplingParams
from fuse.interstage.migration import Policy
from fuse.interstage.rollout import Rollout
from fuse.sample import Sample
from fuse.training.reading import TokenSequence
from fuse.training.scoring import Inference
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import Departure, Progress
from fuse.workers.model_handle import ModelHandle


class EmulatedTime:
    """Events in the order of their times. message_s: that a call takes to its worker, and an answer from there.

    Waits for calls in place of `PendingCalls`. num_calls: by method.
    """

    def __init__(self, message_s: float) -> None:
        self.now_s, self.message_s = 0.0, message_s
        self.num_calls: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._then: dict[Call, Callable[[], None]] = {}

    def now(self) -> float:
        return self.now_s

    def at(self, time_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), do))

    def __len__(self) -> int:
        return len(self._then)

    def expect(self, call: Call, then: Callable[[], None]) -> None:
        self._then[call] = then

    def heard(self, timeout_s: float) -> list[Callable[[], None]]:
        latest_s = self.now_s + timeout_s
        while not (ended := [call for call in self._then if call.has_ended]):
            if self._events[0][0] > latest_s:
                self.now_s = latest_s
                break
            self.now_s = max(self.now_s, self._events[0][0])
            while self._events and self._events[0][0] <= self.now_s:  # what happens at one time is one piece of news
                heapq.heappop(self._events)[2]()
        return [self._then.pop(call) for call in ended]


class Call:
    """A call of a worker; it ends a message's time after the worker has answered."""

    def __init__(self, time: EmulatedTime) -> None:
        self._time, self._value, self.has_ended = time, None, False

    def answer(self, value: Any) -> None:
        self._value = value
        self._time.at(self._time.now_s + self._time.message_s, self._end)

    def _end(self) -> None:
        self.has_ended = True

    def result(self) -> Any:
        return self._value


class EmulatedWorker:
    """What handles call."""

    def __init__(self, role: str, device: int, time: EmulatedTime) -> None:
        self.role, self.device, self.time = role, device, time

    def call(self, method: Callable[..., Any], *args: Any) -> Call:
        call, name = Call(self.time), method.__name__
        self.time.num_calls[name] += 1
        self.time.at(self.time.now_s + self.time.message_s, lambda: getattr(self, name)(call, *args))
        return call


class EngineWorker(EmulatedWorker):
    """An engine, and what it has not told of."""

    def __init__(self, device: int, time: EmulatedTime, costs: EmulatedCosts, max_batch: int) -> None:
        super().__init__("generation worker", device, time)
        self._device = EmulatedDevice(time.now, sleep=lambda seconds: None)
        self._engine = EmulatedEngine(costs, max_batch, self._device)
        self._live: set[int] = set()
        self._untold: dict[int, list[GeneratedToken]] = {}
        self._positions: dict[int, int] = {}  # of the first token that is not told
        self._commands: list[Callable[[], None]] = []
        self._poll: Call | None = None
        self._is_stepping = self._has_finished = False

    @property
    def handle(self) -> GenerationHandle:
        worker: Any = self
        return GenerationHandle(worker)

    def submit(self, call: Call, requests: Sequence[GenerationRequest]) -> None:
        self.admit(call, [Departure(request) for request in requests])

    def admit(self, call: Call, departures: Sequence[Departure]) -> None:
        def enter() -> None:
            for request in (departure.request for departure in departures):
                self._engine.submit(request)
                self._live.add(request.sample_id)
                self._positions[request.sample_id] = len(request.response_ids)

        call.answer(None)
        self._do(enter)

    def evict(self, call: Call, sample_ids: Sequence[int], with_kv: bool) -> None:
        def leave() -> None:
            gone = [one for one in sample_ids if one in self._live]
            call.answer([Departure(self._engine.evict(one).request) for one in gone])
            self._live.difference_update(gone)
            for one in gone:
                self._untold.pop(one, None)

        self._do(leave)

    def poll(self, call: Call, timeout_s: float) -> None:
        def late() -> None:
            if self._poll is call:
                self._tell()

        self._poll = call
        self.time.at(self.time.now_s + timeout_s, late)
        self._tell_if_due()

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if not self._is_stepping:
            self._go_on()

    def _go_on(self) -> None:
        for command in self._commands:
            command()
        self._commands.clear()
        self._tell_if_due()
        if self._live:
            self._is_stepping = True
            tokens = self._engine.step()
            self.time.at(self._device.free_s, lambda: self._stepped(tokens))

    def _stepped(self, tokens: Sequence[GeneratedToken]) -> None:
        self._is_stepping = False
        for token in tokens:
            self._untold.setdefault(token.sample_id, []).append(token)
            if token.finished:
                self._has_finished = True
                self._live.remove(token.sample_id)
        self._go_on()

    def _tell_if_due(self) -> None:
        if self._poll is not None and (self._has_finished or not self._live):
            self._tell()

    def _tell(self) -> None:
        progress = []
        for sample_id, tokens in self._untold.items():
            ids = tuple(token.token_id for token in tokens)
            progress.append(
                Progress(sample_id, self._positions[sample_id], ids, (0.0,) * len(ids), tokens[-1].finished)
            )
            self._positions[sample_id] += len(ids)
        self._untold.clear()
        self._has_finished = False
        call, self._poll = self._poll, None
        assert call is not None
        call.answer(progress)


class ModelWorker(EmulatedWorker):
    """Scores with zeros."""

    def __init__(self, device: int, time: EmulatedTime, costs: EmulatedCosts) -> None:
        super().__init__("model worker", device, time)
        self._costs, self._free_s = costs, 0.0

    @property
    def handle(self) -> ModelHandle:
        worker: Any = self
        return ModelHandle(worker)

    def infer(self, call: Call, sequences: Sequence[TokenSequence]) -> None:
        num_tokens = sum(map(len, sequences))
        seconds = sum(self._costs.scoring_s(role, num_tokens) for role in self._costs.scoring)
        self._free_s = max(self._free_s, self.time.now_s) + seconds
        said = [Inference(values=np.zeros(len(one.response_ids) + 1, np.float32)) for one in sequences]
        self.time.at(self._free_s, lambda: call.answer(said))


def roll_out(
    rollout: Rollout, costs: EmulatedCosts, policy: Policy, *, message_s: float = 0.0, poll_s: float = 0.25
) -> tuple[RolloutReport, Counter[str]]:
    """A simulated rollout, live; and how often each method was called. poll_s: between two reports of an engine."""
    time, limits = EmulatedTime(message_s), rollout.limits
    devices = range(rollout.num_devices)
    scorers = [ModelWorker(device, time, costs).handle for device in devices]
    running = LiveRollout(
        [EngineWorker(device, time, costs, limits.max_batch).handle for device in devices],
        lambda: scorers,
        [Sample(index, (index,) * tokens) for index, tokens in enumerate(rollout.prompt_tokens.tolist())],
        SamplingParams(seed=0, temperature=1.0, max_new_tokens=limits.max_new_tokens),
        policy=policy,
        limits=limits,
        pad_token_id=0,
        costs=rollout.costs,
        max_new_tokens=dict(enumerate(rollout.response_tokens.tolist())),
    )
    pending: Any = time
    running._pending = pending
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "time", SimpleNamespace(perf_counter=time.now, monotonic=time.now))
        patch.setattr(live, "_POLL_TIMEOUT_S", poll_s)
        return running.run(), time.num_calls
