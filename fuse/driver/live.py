"""The live rollout: generation and inference at the granularity of samples, as a policy decides.

One loop in the driver takes the workers' answers as they come. Whatever has finished, moved, been scored or died is one
piece of news; the policy is then asked, and its actions become calls that nobody waits for. Workers never wait for the
controller but where they have nothing to do. Every sample is in one state and one place (`Sample.advance` asserts it),
and a sample whose engine dies goes on elsewhere from the tokens that the controller has: its noise depends on none of
this, so its tokens are the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fuse.activity import silent
from fuse.driver.stage_by_stage import apply_inference, apply_progress, progress_text, sequence_of
from fuse.engines.engine import GenerationRequest, SamplingParams
from fuse.interstage.costs import CostModel, MigrationKind, cheaper_migration
from fuse.interstage.migration import Action, EngineLimits, Infer, LiveSamples, Migrate, Policy, RolloutState
from fuse.sample import Sample, SampleState
from fuse.training.scoring import Inference
from fuse.workers.cluster import Future, Worker, wait_ended
from fuse.workers.errors import WorkerError
from fuse.workers.generation_worker import Departure, Progress

_logger = logging.getLogger(__name__)

_POLL_TIMEOUT_S = 0.25
"""Between two reports of an engine on which nothing finishes: how stale its samples' lengths may be to the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReport:
    """What a rollout took. decision_s: from news to the last call it led to, per decision, in seconds.

    generation_s, makespan_s: from the start to the last token and to the last score.
    lost_engines: devices whose engine died; its samples went on elsewhere.
    """

    makespan_s: float
    generation_s: float
    num_migrations: int
    moved_bytes: int
    decision_s: tuple[float, ...]
    lost_engines: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Device:
    """A device's workers and what they are at. held: live samples that its engine has been given."""

    index: int
    engine: Worker | None
    held: dict[int, None] = field(default_factory=dict)
    is_polled: bool = False
    num_evictions: int = 0
    released: bool = False
    job: Infer | None = None
    is_scoring: bool = False
    arrivals: list[Departure] = field(default_factory=list)  # admitted when what the device scores is done


class LiveRollout:
    """One batch on its way from prompts to scores; `run` it once.

    engines: a generation worker per device; a device without one only scores.
    scorers: gives a model worker per device; called when one is first needed, for they may still be starting.
    policy: called at the start, whenever samples finish, and whenever a device has scored what it was given.
    costs: choose between moving KV and computing it again; None, or an engine without KV to move, always computes.
    on_generated: called with samples as they finish, before they are scored.
    max_new_tokens: by sample id, in place of that of `params`; with no stop token it forces lengths.
    tell: hears how far it is.
    """

    def __init__(
        self,
        engines: Sequence[Worker | None],
        scorers: Callable[[], Sequence[Worker]],
        samples: Sequence[Sample],
        params: SamplingParams,
        *,
        policy: Policy,
        limits: EngineLimits,
        pad_token_id: int,
        costs: CostModel | None = None,
        on_generated: Callable[[Sequence[Sample]], None] = lambda samples: None,
        max_new_tokens: Mapping[int, int] | None = None,
        tell: Callable[[str], None] = silent,
    ) -> None:
        self._devices = [_Device(index, engine) for index, engine in enumerate(engines)]
        self._scorers = scorers
        self._batch = tuple(samples)  # policies know a sample by its index here
        self._samples: Mapping[int, Sample] = {sample.id: sample for sample in samples}
        self._params, self._policy, self._limits, self._costs = params, policy, limits, costs
        self._pad_token_id, self._on_generated = pad_token_id, on_generated
        self._max_new_tokens = max_new_tokens or {}
        self._tell = tell
        self._home: dict[int, int] = {}  # live samples: where each is, or is going to
        self._pending: dict[Future, Callable[[Future], None]] = {}
        self._num_scored = self._num_migrations = self._moved_bytes = 0
        self._lost_engines: list[int] = []
        self._has_news = False

    def run(self) -> RolloutReport:
        """Generate and score all samples.

        Raises:
            WorkerError: a model worker died or raised, an engine raised, or the last engine died.
        """
        start_s = generated_s = time.perf_counter()
        decision_s = []
        self._submit_all()
        self._has_news = True
        while self._num_scored < len(self._samples):
            if not self._has_news:
                self._take_answers()
            if self._has_news:
                news_s = time.perf_counter()
                self._has_news = False
                generated_s = news_s if self._home else generated_s
                self._act(self._policy(self._state()))
                decision_s.append(time.perf_counter() - news_s)
        while self._pending:  # polls of engines that are empty now; left alone, they would eat the next reports
            self._take_answers()
        assert not self._home
        assert all(sample.state is SampleState.SCORED for sample in self._samples.values())
        return RolloutReport(
            makespan_s=time.perf_counter() - start_s,
            generation_s=generated_s - start_s,
            num_migrations=self._num_migrations,
            moved_bytes=self._moved_bytes,
            decision_s=tuple(decision_s),
            lost_engines=tuple(self._lost_engines),
        )

    def _take_answers(self) -> None:
        for future in wait_ended(list(self._pending)):
            self._pending.pop(future)(future)
        self._tell(progress_text(self._batch))

    # Generation

    def _submit_all(self) -> None:
        alive = self._with_engines()
        shares: list[list[Sample]] = [[] for _ in alive]
        for index, sample in enumerate(self._samples.values()):
            sample.advance(SampleState.GENERATING)
            self._home[sample.id] = alive[index % len(alive)].index
            shares[index % len(alive)].append(sample)
        for device, share in zip(alive, shares, strict=True):
            self._submit(device, share)

    def _submit(self, device: _Device, samples: Sequence[Sample]) -> None:
        self._give(device, "submit", [self._request(sample) for sample in samples], samples)

    def _give(self, device: _Device, method: str, arguments: Sequence[object], samples: Iterable[Sample]) -> None:
        """Hand samples to a device's engine; the call only queues them, so its end says no more than its error."""
        if not arguments:
            return
        assert device.engine is not None
        device.held |= dict.fromkeys(sample.id for sample in samples)
        self._call(device, device.engine, method, lambda _: None, arguments)
        self._poll(device)

    def _poll(self, device: _Device) -> None:
        if device.engine is not None and device.held and not device.is_polled:
            device.is_polled = True
            self._call(device, device.engine, "poll", lambda reports: self._progress(device, reports), _POLL_TIMEOUT_S)

    def _progress(self, device: _Device, reports: Sequence[Progress]) -> None:
        device.is_polled = False
        finished = []
        for progress in reports:
            sample = self._samples[progress.sample_id]
            if sample.id not in device.held:
                continue  # it left with these tokens
            if progress.finished and sample.state is SampleState.MIGRATING:
                sample.advance(SampleState.GENERATING)  # it was done before it could leave
            if apply_progress(sample, progress, self._params, self._pad_token_id):
                del device.held[sample.id], self._home[sample.id]
                finished.append(sample)
        if finished:
            self._on_generated(finished)
            self._has_news = True
        self._poll(device)
        self._start_job(device)

    # Migration

    def _migrate(self, moves: Sequence[Migrate]) -> None:
        groups: dict[tuple[int, bool], dict[int, int]] = {}
        for move in moves:
            sample = self._batch[move.sample]
            assert self._home[sample.id] == move.source != move.target
            assert sample.state is SampleState.GENERATING, f"sample {sample.id} cannot be moved"
            if self._devices[move.target].engine is None:
                continue  # policies do not know of lost engines; the sample stays
            sample.advance(SampleState.MIGRATING)
            self._home[sample.id] = move.target
            self._devices[move.target].released = False
            groups.setdefault((move.source, self._moves_kv(sample)), {})[sample.id] = move.target
        for (source, with_kv), targets in groups.items():
            device = self._devices[source]
            assert device.engine is not None
            device.num_evictions += 1

            def evicted(departures: Sequence[Departure], device: _Device = device) -> None:
                device.num_evictions -= 1
                self._depart(device, departures)

            self._call(device, device.engine, "evict", evicted, list(targets), with_kv)

    def _moves_kv(self, sample: Sample) -> bool:
        if self._costs is None or not sample.response_ids:
            return False
        context_tokens = len(sample.prompt_ids) + len(sample.response_ids)
        return cheaper_migration(self._costs, context_tokens).kind is MigrationKind.TRANSFER

    def _depart(self, device: _Device, departures: Sequence[Departure]) -> None:
        for departure in departures:
            sample = self._samples[departure.request.sample_id]
            sample.response_ids[:] = departure.request.response_ids
            sample.logprobs[:] = departure.request.logprobs
            del device.held[sample.id]
            self._num_migrations += bool(sample.response_ids)
            self._moved_bytes += 0 if departure.kv is None else departure.kv.num_bytes
        self._arrive(departures)
        self._start_job(device)

    def _arrive(self, departures: Iterable[Departure]) -> None:
        """Let each sample into the engine it goes to, those of one engine together."""
        by_target: dict[int, list[Departure]] = {}
        for departure in departures:
            by_target.setdefault(self._target(self._samples[departure.request.sample_id]), []).append(departure)
        for target, arriving in by_target.items():
            self._devices[target].arrivals += arriving
            self._admit(self._devices[target])

    def _target(self, sample: Sample) -> int:
        """Where a sample without an engine goes: where it was sent, or else to the engine with the fewest."""
        home = self._devices[self._home[sample.id]]
        if home.engine is None:
            counts = np.bincount(list(self._home.values()), minlength=len(self._devices))
            home = min(self._with_engines(), key=lambda device: int(counts[device.index]))
            self._home[sample.id] = home.index
            home.released = False
        return home.index

    def _admit(self, device: _Device) -> None:
        """Let arrived samples into the engine, unless the device is scoring."""
        if device.is_scoring:
            return
        arrivals, device.arrivals = device.arrivals, []
        samples = [self._samples[departure.request.sample_id] for departure in arrivals]
        for sample in samples:
            sample.advance(SampleState.GENERATING)
        self._give(device, "admit", arrivals, samples)

    # Inference

    def _start_job(self, device: _Device) -> None:
        """Score what the device was given, once its engine is empty."""
        if device.job is None or device.is_scoring or device.held or device.num_evictions:
            return
        device.is_scoring = True
        samples = [self._batch[sample] for sample in device.job.samples]

        def scored(results: Sequence[Inference]) -> None:
            apply_inference(samples, results)
            self._num_scored += len(samples)
            device.job, device.is_scoring = None, False
            self._has_news = True
            self._admit(device)

        scorer = self._scorers()[device.index]
        self._call(device, scorer, "infer", scored, [sequence_of(sample) for sample in samples])

    # The policy

    def _state(self) -> RolloutState:
        ids = [index for index, sample in enumerate(self._batch) if sample.id in self._home]
        live = [self._batch[index] for index in ids]
        backlog = [index for index, sample in enumerate(self._batch) if sample.state is SampleState.GENERATED]
        response_tokens = np.array([len(sample.response_ids) for sample in live], dtype=np.int64)
        return RolloutState(
            limits=self._limits,
            live=LiveSamples(
                ids=np.array(ids, dtype=np.int64),
                devices=np.array([self._home[sample.id] for sample in live], dtype=np.int64),
                prompt_tokens=np.array([len(sample.prompt_ids) for sample in live], dtype=np.int64),
                response_tokens=response_tokens,
                started=response_tokens > 0,
                movable=np.array([sample.state is SampleState.GENERATING for sample in live], dtype=np.bool_),
            ),
            finished_ids=np.array(backlog, dtype=np.int64),
            finished_tokens=np.array([self._num_tokens(index) for index in backlog], dtype=np.int64),
            released=np.array([device.released for device in self._devices], dtype=np.bool_),
            inferring_tokens=np.array([self._job_tokens(device) for device in self._devices], dtype=np.int64),
        )

    def _job_tokens(self, device: _Device) -> int:
        return 0 if device.job is None else sum(map(self._num_tokens, device.job.samples))

    def _num_tokens(self, index: int) -> int:
        """Of a finished sample, as far as it counts: the length of its `sequence_of`, without the copy."""
        sample = self._batch[index]
        return len(sample.prompt_ids) + sample.length

    def _act(self, actions: Sequence[Action]) -> None:
        self._migrate([action for action in actions if isinstance(action, Migrate)])
        for action in actions:
            if isinstance(action, Migrate):
                continue
            device = self._devices[action.device]
            device.released = True
            if isinstance(action, Infer):
                assert device.job is None, f"device {device.index} is to infer twice at once"
                for sample in action.samples:
                    self._batch[sample].advance(SampleState.INFERRING)
                device.job = action
                self._start_job(device)

    # Calls, and engines that die

    def _call(
        self, device: _Device, worker: Worker, method: str, then: Callable[..., None], *arguments: object
    ) -> None:
        def ended(future: Future) -> None:
            try:
                result = future.result()
            except WorkerError as error:
                if method == "infer" or not error.is_death:
                    raise
                self._lose_engine(device, worker, error)
                return
            if method == "infer" or worker is device.engine:
                then(result)

        self._pending[worker.call(method, *arguments)] = ended

    def _lose_engine(self, device: _Device, worker: Worker, error: WorkerError) -> None:
        """Go on without an engine: its samples continue elsewhere from the tokens known here."""
        if device.engine is not worker:
            return  # an earlier call has told
        _logger.warning("%s; its samples go on elsewhere", error)
        self._lost_engines.append(device.index)
        device.engine, device.num_evictions, device.is_polled = None, 0, False
        stranded = [self._samples[sample] for sample in device.held]
        stranded += [self._samples[departure.request.sample_id] for departure in device.arrivals]
        device.held.clear()
        device.arrivals.clear()
        if not self._with_engines():
            raise error
        for sample in stranded:
            if sample.state is SampleState.GENERATING:
                sample.advance(SampleState.MIGRATING)
        self._arrive(Departure(self._request(sample)) for sample in stranded)
        self._has_news = True
        self._start_job(device)

    def _with_engines(self) -> list[_Device]:
        return [device for device in self._devices if device.engine is not None]

    def _request(self, sample: Sample) -> GenerationRequest:
        return GenerationRequest(
            sample_id=sample.id,
            prompt_ids=sample.prompt_ids,
            params=replace(
                self._params, max_new_tokens=self._max_new_tokens.get(sample.id, self._params.max_new_tokens)
            ),
            response_ids=tuple(sample.response_ids),
            logprobs=tuple(sample.logprobs),
        )
