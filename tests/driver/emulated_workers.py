"""Workers of emulated devices on a clock that jumps from one event to the next: a live rollout without processes.

Engines are `EmulatedEngine`, and around them stands what `GenerationWorker` does: commands take effect between two
steps, and a poll ends as soon as a sample has finished.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fuse.algorithms.algorithm import Early
from fuse.algorithms.batch import Experience
from fuse.algorithms.group_batch import GroupTargets, actor_experience
from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.emulated.device import EmulatedDevice
from fuse.benchmarks.emulated.engine import EmulatedEngine
from fuse.driver import live, live_tail
from fuse.driver.live import LiveRollout
from fuse.driver.live_tail import TailRollout
from fuse.driver.rollout_state import RolloutReport
from fuse.driver.tail import Tail, TailPlan
from fuse.engines.engine import GeneratedToken, GenerationRequest, SamplingParams
from fuse.interstage.migration import Policy
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate_tail import TailWork
from fuse.intrastage.placement import Replica
from fuse.sample import Sample
from fuse.training.reading import TokenSequence
from fuse.training.rounds import RankRound, Round, StepPart
from fuse.training.scoring import Inference
from fuse.training.tail import FirstStep
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


class SharedDevice(EmulatedDevice):
    """Takes so many times as long, from the next step on, while it also trains."""

    factor = 1.0

    def work(self, seconds: float) -> None:
        super().work(seconds * self.factor)


class EngineWorker(EmulatedWorker):
    """An engine, and what it has not told of."""

    def __init__(self, device: int, time: EmulatedTime, costs: EmulatedCosts, max_batch: int) -> None:
        super().__init__("generation worker", device, time)
        self._device = SharedDevice(time.now, sleep=lambda seconds: None)
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

    @property
    def decodes(self) -> bool:
        return bool(self._live)

    def slow_down(self, factor: float) -> None:
        """From the next step on."""
        self._device.factor = factor

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

    def poll(self, call: Call, timeout_s: float, gather_s: float) -> None:
        """At once, for `gather_s` is what this machine takes, which has no part in emulated time."""

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


class TrainingWorker(ModelWorker):
    """Trains, too, on nothing. engines: of the devices of its replica."""

    def __init__(
        self, device: int, time: EmulatedTime, costs: EmulatedCosts, engines: Sequence[EngineWorker], work: TailWork
    ) -> None:
        super().__init__(device, time, costs)
        self._engines, self._work = engines, work

    def accumulate(self, call: Call, model: str, replica: int, experience: Experience, part: StepPart) -> None:
        sizes = [len(prompt) + length for prompt, length in zip(experience.prompts, experience.lengths, strict=True)]
        seconds = self._work.seconds([sum(sizes[one] for one in own) for own in part.micro_batches])
        if any(engine.decodes for engine in self._engines):
            sharing = self._work.settings.sharing
            assert sharing is not None, "a device decodes while it trains"
            seconds *= sharing.training
            for engine in self._engines:
                engine.slow_down(sharing.decoding)

        def trained() -> None:
            for engine in self._engines:
                engine.slow_down(1.0)
            call.answer(RankRound(metrics={}, gradient_norms={}, said={model: ()}))

        self.time.at(self.time.now_s + seconds, trained)


def unestimated(samples: Sequence[Sample]) -> Experience:
    """Of scored samples, with nothing but their lengths."""
    lengths = [sample.length for sample in samples]
    nothing = torch.zeros(sum(lengths))
    names = ("sampler_logprobs", "old_logprobs", "reference_logprobs", "advantages", "batch_weights")
    targets = GroupTargets(token_ids=nothing.long(), mask=nothing.bool(), **dict.fromkeys(names, nothing))
    return actor_experience(samples, lengths, targets)


def roll_out(
    rollout: Rollout, costs: EmulatedCosts, policy: Policy, *, message_s: float = 0.0, poll_s: float = 0.25
) -> tuple[RolloutReport, Counter[str]]:
    """A simulated rollout, live; and how often each method was called. poll_s: between two reports of an engine."""
    time = EmulatedTime(message_s)
    devices = range(rollout.num_devices)
    engines = [EngineWorker(device, time, costs, rollout.limits.max_batch) for device in devices]
    scorers = [ModelWorker(device, time, costs).handle for device in devices]
    return _run(LiveRollout, rollout, policy, time, engines, scorers, poll_s), time.num_calls


def roll_out_with_training(
    rollout: Rollout, costs: EmulatedCosts, policy: Policy, work: TailWork
) -> tuple[RolloutReport, int]:
    """As `roll_out`, with what is trained in it; and the samples that were. Every sample is a group of its own."""
    time, num_stages = EmulatedTime(0.0), work.settings.num_stages
    devices = range(rollout.num_devices)
    engines = [EngineWorker(device, time, costs, rollout.limits.max_batch) for device in devices]
    ranks = [tuple(range(first, first + num_stages)) for first in range(0, rollout.num_devices, num_stages)]
    workers = [
        TrainingWorker(rank, time, costs, [engines[other] for other in own], work).handle
        for own in ranks
        for rank in own
    ]
    size = work.settings.micro_batch_size
    drawn = tuple(tuple(range(first, first + size)) for first in range(0, rollout.num_samples, size))
    part = StepPart(micro_batches=drawn, weights=(1.0,) * len(drawn), is_last=True)
    early = Early(role="actor", estimate=lambda samples, width: unestimated(samples), mean_over="samples")
    step = FirstStep.of(early, [Round({"actor": part})], [[sample] for sample in range(rollout.num_samples)])
    assert step is not None
    replicas = [Replica("actor", index, own) for index, own in enumerate(ranks)]
    plan = TailPlan(step=step, known=lambda scored: scored)
    tail = Tail(plan, workers, replicas, sharing=work.settings.sharing)
    report = _run(partial(TailRollout, tail=tail), rollout, policy, time, engines, workers, poll_s=1e-3)
    return report, tail.num_trained


def _run(
    kind: Any,
    rollout: Rollout,
    policy: Policy,
    time: EmulatedTime,
    engines: Sequence[EngineWorker],
    scorers: Sequence[ModelHandle],
    poll_s: float,
) -> RolloutReport:
    running = kind(
        [engine.handle for engine in engines],
        lambda: scorers,
        [Sample(index, (index,) * tokens) for index, tokens in enumerate(rollout.prompt_tokens.tolist())],
        SamplingParams(seed=0, temperature=1.0, max_new_tokens=rollout.limits.max_new_tokens),
        policy=policy,
        limits=rollout.limits,
        pad_token_id=0,
        costs=rollout.costs,
        max_new_tokens=dict(enumerate(rollout.response_tokens.tolist())),
    )
    running._pending = time
    with pytest.MonkeyPatch.context() as patch:
        for module in (live, live_tail):
            patch.setattr(
                module, "time", SimpleNamespace(perf_counter=time.now, monotonic=time.now, thread_time=lambda: 0.0)
            )
        patch.setattr(live, "_POLL_TIMEOUT_S", poll_s)
        report: RolloutReport = running.run()
    return report
