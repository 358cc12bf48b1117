"""The live rollout: generation and inference at the granularity of samples, as a policy decides.

One loop in the driver takes the workers' answers as they come. Whatever has finished, moved, been scored or died is one
piece of news; the policy is then asked, and its actions become calls that nobody waits for. Workers never wait for the
controller but where they have nothing to do. Every sample is in one state and one place (`Sample.advance` asserts it),
and a sample whose engine dies goes on elsewhere from the tokens that the controller has: its noise depends on none of
this, so its tokens are the same.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from fuse.activity import silent
from fuse.driver.rollout_state import RolloutDevice, RolloutReport, SampleTable, moves_kv
from fuse.driver.score_flow import Scorers, scorers_of
from fuse.driver.stage_by_stage import WAIT_S, apply_inference, apply_progress, request_of, sequence_of, skip_inference
from fuse.engines.engine import SamplingParams
from fuse.interstage.costs import CostModel
from fuse.interstage.dealing import Dealing
from fuse.interstage.migration import Action, EngineLimits, Infer, Migrate, Policy, evens_out
from fuse.sample import Sample, SampleState
from fuse.training.scoring import Inference
from fuse.workers.calls import Future, PendingCalls
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.generation_worker import Departure, Progress
from fuse.workers.model_handle import ModelHandle

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)

_POLL_TIMEOUT_S = 0.25
"""Between two reports of an engine on which nothing finishes: how stale its samples' lengths may be to the policy."""
_GATHERING = 20
"""An engine that is not empty gathers news for as many times as long as it takes this thread to act on some."""


class LiveRollout:
    """One batch on its way from prompts to scores; `run` it once.

    engines: a generation worker per device; a device without one only scores. Devices that share one count as one.
    scorers: gives a model worker per device; called when one is first needed, for they may still be starting. None
        where no model scores.
    flow_roles: the models that score through pipelines over all devices; none where every device scores by itself.
    policy: called at the start, whenever samples finish, and whenever a device has scored what it was given.
    costs: choose between moving KV and computing it again; None, or an engine without KV to move, always computes.
    dealing: which samples each engine starts with.
    on_generated: called with samples as they finish, before they are scored.
    max_new_tokens: by sample id, in place of that of `params`; with no stop token it forces lengths.
    timeout_s: an engine with samples and no token for so long counts as lost, and so does a model worker that scores
        for so long. tell: hears how far it is.
    """

    def __init__(
        self,
        engines: Sequence[GenerationHandle | None],
        scorers: Callable[[], Sequence[ModelHandle]] | None,
        samples: Sequence[Sample],
        params: SamplingParams,
        *,
        policy: Policy,
        limits: EngineLimits,
        flow_roles: Sequence[str] = (),
        pad_token_id: int | None,
        costs: CostModel | None = None,
        dealing: Dealing | None = None,
        on_generated: Callable[[Sequence[Sample]], None] = lambda samples: None,
        max_new_tokens: Mapping[int, int] | None = None,
        timeout_s: float = math.inf,
        tell: Callable[[str], None] = silent,
    ) -> None:
        self._devices = [RolloutDevice(index, engine) for index, engine in enumerate(engines)]
        self._scorers, self._flow_roles = scorers, tuple(flow_roles)
        self._scorers_here: Scorers | None = None
        self._table = SampleTable(samples)
        self._params, self._policy, self._limits, self._costs = params, policy, limits, costs
        self._pad_token_id, self._on_generated = pad_token_id, on_generated
        self._request = partial(request_of, params=params, max_new_tokens=max_new_tokens or {})
        self._dealing = dealing or Dealing()
        self._timeout_s, self._tell = timeout_s, tell
        self._pending = PendingCalls()
        self._num_scored = self._num_migrations = self._moved_bytes = 0
        self._lost_engines: list[int] = []
        self._has_news = True
        self._gather_s = 0.0

    def run(self) -> RolloutReport:
        """Generate and score all samples.

        Raises:
            WorkerError: a model worker died, raised or was silent, an engine raised, or the last engine was lost.
        """
        start_s = self._generated_s = time.perf_counter()
        decision_s = []
        began_s = time.thread_time()
        self._submit_all()
        while self._num_scored < len(self._table.samples):
            if not self._has_news:
                self._take_answers()
            if self._has_news:
                news_s = time.perf_counter()
                self._has_news = False
                seen = self._table.seen(self._devices, self._limits, self._costs, time.monotonic())
                self._act(self._policy(seen))
                decision_s.append(time.perf_counter() - news_s)
                worked_s = (time.thread_time() - began_s) / len(decision_s)
                self._gather_s = min(_POLL_TIMEOUT_S, _GATHERING * worked_s)
        while self._pending:  # polls of engines that are empty now; left alone, they would eat the next reports
            self._take_answers()
        assert not self._table.home
        assert all(sample.state is SampleState.SCORED for sample in self._table.samples)
        return RolloutReport(
            makespan_s=time.perf_counter() - start_s,
            generation_s=self._generated_s - start_s,
            num_migrations=self._num_migrations,
            moved_bytes=self._moved_bytes,
            decision_s=tuple(decision_s),
            lost_engines=tuple(self._lost_engines),
            scoring_calls=tuple(one for device in self._devices for one in device.scoring_calls),
        )

    def _take_answers(self) -> None:
        for then in self._pending.heard(WAIT_S):
            then()
        self._end_silent_ones()
        self._tell(self._table.progress_text())

    # Generation

    def _submit_all(self) -> None:
        alive = self._with_engines()
        shares = self._dealing.shares(self._table.samples, len(alive), is_evened_out=evens_out(self._policy))
        for device, share in zip(alive, shares, strict=True):
            for sample in share:
                self._table.advance(sample, SampleState.GENERATING)
                self._table.put(sample, device.index)
            if share:
                assert device.engine is not None
                self._given(device, share, device.engine.submit([self._request(sample) for sample in share]))

    def _given(self, device: RolloutDevice, samples: Sequence[Sample], queued: Future[None]) -> None:
        """A device's engine has been handed samples: the end of that call says no more than its error."""
        if not device.held:
            device.heard_s = time.monotonic()
        device.held |= dict.fromkeys(sample.id for sample in samples)
        self._expect(device, queued, lambda _: None)
        self._poll(device)

    def _poll(self, device: RolloutDevice) -> None:
        if device.engine is not None and device.held and not device.is_polled:
            device.is_polled = True
            polled = device.engine.poll(_POLL_TIMEOUT_S, self._gather_s)
            self._expect(device, polled, lambda reports: self._progress(device, reports))

    def _progress(self, device: RolloutDevice, reports: Sequence[Progress]) -> None:
        device.is_polled = False
        if reports:
            device.heard_s = time.monotonic()
        finished = []
        for progress in reports:
            sample = self._table.by_id[progress.sample_id]
            if sample.id not in device.held:
                continue  # it left with these tokens
            if progress.finished and sample.state is SampleState.MIGRATING:
                self._table.advance(sample, SampleState.GENERATING)  # it was done before it could leave
            if apply_progress(sample, progress, self._params, self._pad_token_id):
                del device.held[sample.id], self._table.home[sample.id]
                finished.append(sample)
            self._table.update(sample)
        if finished:
            self._generated_s = time.perf_counter()
            self._on_generated(finished)
            self._has_news = True
            if self._scorers is None:
                skip_inference(finished)
                self._table.update(*finished)
                self._num_scored += len(finished)
        self._poll(device)
        self._start_job(device)

    # Migration

    def _migrate(self, moves: Sequence[Migrate]) -> None:
        groups: dict[tuple[int, bool], list[int]] = {}
        for move in moves:
            sample = self._table.samples[move.sample]
            assert self._table.home[sample.id] == move.source != move.target
            assert sample.state is SampleState.GENERATING, f"sample {sample.id} cannot be moved"
            assert self._devices[move.target].engine is not None, f"the engine of device {move.target} is lost"
            self._table.advance(sample, SampleState.MIGRATING)
            self._table.put(sample, move.target)
            self._devices[move.target].released = False
            groups.setdefault((move.source, moves_kv(self._costs, sample)), []).append(sample.id)
        for (source, with_kv), sample_ids in groups.items():
            self._evict(self._devices[source], sample_ids, with_kv)

    def _evict(self, device: RolloutDevice, sample_ids: Sequence[int], with_kv: bool) -> None:
        assert device.engine is not None
        device.num_evictions += 1

        def evicted(departures: Sequence[Departure]) -> None:
            device.num_evictions -= 1
            self._depart(device, departures)

        self._expect(device, device.engine.evict(sample_ids, with_kv), evicted)

    def _depart(self, device: RolloutDevice, departures: Sequence[Departure]) -> None:
        for departure in departures:
            sample = self._table.by_id[departure.request.sample_id]
            sample.response_ids[:] = departure.request.response_ids
            sample.logprobs[:] = departure.request.logprobs
            self._table.update(sample)
            del device.held[sample.id]
            self._num_migrations += bool(sample.response_ids)
            self._moved_bytes += 0 if departure.kv is None else departure.kv.num_bytes
        self._arrive(departures)
        self._start_job(device)

    def _arrive(self, departures: Iterable[Departure]) -> None:
        """Let each sample into the engine it goes to, those of one engine together."""
        by_target: dict[int, list[Departure]] = {}
        for departure in departures:
            by_target.setdefault(self._target(self._table.by_id[departure.request.sample_id]), []).append(departure)
        for target, arriving in by_target.items():
            self._devices[target].arrivals += arriving
            self._admit(self._devices[target])

    def _target(self, sample: Sample) -> int:
        """Where a sample without an engine goes: where it was sent, or else to the engine with the fewest."""
        home = self._devices[self._table.home[sample.id]]
        if home.engine is None:
            counts = Counter(self._table.home.values())
            home = min(self._with_engines(), key=lambda device: counts[device.index])
            self._table.put(sample, home.index)
            home.released = False
        return home.index

    def _admit(self, device: RolloutDevice) -> None:
        """Let arrived samples into the engine, unless the device is scoring."""
        if device.is_scoring or not device.arrivals:
            return
        assert device.engine is not None
        arrivals, device.arrivals = device.arrivals, []
        samples = [self._table.by_id[departure.request.sample_id] for departure in arrivals]
        for sample in samples:
            self._table.advance(sample, SampleState.GENERATING)
        self._given(device, samples, device.engine.admit(arrivals))

    # Inference

    def _start_job(self, device: RolloutDevice) -> None:
        """Score what the device was given, once its engine is empty."""
        if device.job is None or device.is_scoring or device.held or device.num_evictions:
            return
        scorers = self._scoring()  # which may have to start
        device.is_scoring, device.scoring_s = True, time.monotonic()
        samples = [self._table.samples[sample] for sample in device.job.samples]

        def scored(results: Sequence[Inference]) -> None:
            apply_inference(samples, results)
            self._table.update(*samples)
            self._num_scored += len(samples)
            device.end_scoring(time.monotonic())
            self._has_news = True
            self._admit(device)

        scorers.put(device.index, [sequence_of(sample) for sample in samples], scored)

    def _scoring(self) -> Scorers:
        if self._scorers_here is None:
            assert self._scorers is not None, "no model scores"
            self._scorers_here = scorers_of(self._scorers(), len(self._devices), self._flow_roles, self._pending)
        return self._scorers_here

    # The policy

    def _act(self, actions: Sequence[Action]) -> None:
        self._migrate([action for action in actions if isinstance(action, Migrate)])
        for action in (one for one in actions if not isinstance(one, Migrate)):
            device = self._devices[action.device]
            device.released = True
            if isinstance(action, Infer):
                assert device.job is None, f"device {device.index} is to infer twice at once"
                for sample in action.samples:
                    self._table.advance(self._table.samples[sample], SampleState.INFERRING)
                device.job, device.job_tokens = action, self._table.columns.tokens(action.samples)
                self._start_job(device)

    # Calls, and engines that die

    def _expect(self, device: RolloutDevice, future: Future[_T], then: Callable[[_T], None]) -> None:
        """Hear the answer of a device's engine, unless that is lost by then."""
        engine = device.engine

        def ended() -> None:
            try:
                answer = future.result()
            except WorkerError as error:
                if not error.is_death:
                    raise
                if engine is device.engine:  # no earlier call has told
                    self._lose_engine(device, error)
                return
            if engine is device.engine:
                then(answer)

        self._pending.expect(future, ended)

    def _lose_engine(self, device: RolloutDevice, error: WorkerError) -> None:
        """Go on without an engine: its samples continue elsewhere from the tokens known here."""
        _logger.warning("%s; its samples go on elsewhere", error)
        self._lost_engines.append(device.index)
        device.engine, device.num_evictions, device.is_polled = None, 0, False
        stranded = [self._table.by_id[sample] for sample in device.held]
        stranded += [self._table.by_id[departure.request.sample_id] for departure in device.arrivals]
        device.held.clear()
        device.arrivals.clear()
        if not self._with_engines():
            raise error
        for sample in stranded:
            if sample.state is SampleState.GENERATING:
                self._table.advance(sample, SampleState.MIGRATING)
        self._arrive(Departure(self._request(sample)) for sample in stranded)
        self._has_news = True
        self._start_job(device)

    def _end_silent_ones(self) -> None:
        """Lose engines of which nothing has been heard for too long. Raises: WorkerError for a model worker."""
        latest_s = time.monotonic() - self._timeout_s
        for device in self._devices:
            if device.is_scoring and device.scoring_s < latest_s:
                scorer = self._scoring().late(device.index).worker
                raise WorkerError(scorer.device, scorer.role, f"no scores within {self._timeout_s:g} s")
            if device.engine is not None and device.held and device.heard_s < latest_s:
                worker = device.engine.worker
                cause = f"no token within {self._timeout_s:g} s"
                worker.kill()
                self._lose_engine(device, WorkerError(worker.device, worker.role, cause, is_death=True))

    def _with_engines(self) -> list[RolloutDevice]:
        return [device for device in self._devices if device.engine is not None]
