"""Event-driven simulation of a rollout: the policies of the live controller under the costs of a model.

Events are boundaries between decode steps at which a batch changes, arrivals of migrated samples, and ends of
inference. Between events engines advance in closed form, so the time to simulate grows with samples, not tokens.
Simplifications: prefill holds up the engine's batch; KV transfers overlap with decoding and do not share links. Where
engines draft, samples get tokens as expected, one at a time in as much of a step: none is lucky, and boundaries lie
between tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from enum import IntEnum
from itertools import count

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.columns import Phase, SampleColumns
from fuse.interstage.costs import MigrationKind, cheaper_migration, left_to_score
from fuse.interstage.dealing import deal
from fuse.interstage.migration import (
    Action,
    Infer,
    Migrate,
    Policy,
    Release,
    RolloutState,
    evens_out,
)
from fuse.interstage.rollout import BusySpan, Rollout, SampleSpan, SimulationResult, SpanKind
from fuse.interstage.simulated_engine import SimulatedEngine

Ints = NDArray[np.int64]


def simulate(rollout: Rollout, policy: Policy) -> SimulationResult:
    """Play the rollout under the policy, to the last score. Deterministic.

    A policy that breaks its contract fails an assertion, as does a sample that is lost or scored twice.
    """
    return Simulation(rollout, policy).run()


class _EventKind(IntEnum):
    BOUNDARY = 0
    ARRIVAL = 1
    SCORED = 2


class Simulation:
    """Columns over samples and devices, engines, and the heap of events."""

    def __init__(self, rollout: Rollout, policy: Policy) -> None:
        self._rollout, self._policy, self._costs = rollout, policy, rollout.costs
        num_samples, num_devices = rollout.num_samples, rollout.num_devices
        self._phase = np.full(num_samples, Phase.WAITING, dtype=np.int8)
        self._prompts = rollout.prompt_numbers
        self._host = deal(  # the engine that has the sample, or had it last
            self._prompts.tolist(),
            rollout.prompt_tokens,
            num_devices,
            costs=rollout.costs,
            response_tokens=float(rollout.response_tokens.mean()),
            is_evened_out=evens_out(policy),
        )
        self._home = self._host.copy()  # where it is to be: differs while it leaves or travels
        self._tokens = np.zeros(num_samples, dtype=np.int64)  # of the response, when it last entered a batch or left
        self._entered = np.zeros(num_samples, dtype=np.int64)  # the host's step when it entered its batch
        self._in_batch = np.zeros(num_samples, dtype=np.bool_)
        self._started = np.zeros(num_samples, dtype=np.bool_)
        self._reserved = rollout.prompt_tokens + rollout.limits.max_new_tokens

        self._engines = [SimulatedEngine(rollout.costs, rollout.limits) for _ in range(num_devices)]
        self._num_live = np.bincount(self._home, minlength=num_devices)
        self._live_kv = np.bincount(self._home, weights=self._reserved, minlength=num_devices)
        self._released = np.zeros(num_devices, dtype=np.bool_)
        self._inferring_tokens = np.zeros(num_devices, dtype=np.int64)
        # Of each engine's plan: steps so far, when the next starts, its seconds, and how they grow.
        self._step_base = np.zeros(num_devices, dtype=np.int64)
        self._resumed_s, self._growth_s = np.zeros(num_devices), np.zeros(num_devices)
        self._first_step_s = np.ones(num_devices)
        self._planned = [(0, 0.0)] * num_devices
        self._leaving: list[list[tuple[int, int]]] = [[] for _ in range(num_devices)]
        self._jobs: list[Infer | None] = [None] * num_devices
        self._scoring = [False] * num_devices
        self._busy_since_s: list[float | None] = [None] * num_devices
        self._timeline: list[list[BusySpan]] = [[] for _ in range(num_devices)]
        self._entered_s = [0.0] * num_samples
        self._sample_spans: list[SampleSpan] = []

        self._events: list[tuple[float, int, _EventKind, int, int]] = []  # time, order, kind, device, payload
        self._event_order = count()
        self._now_s = self._generation_s = 0.0
        self._num_migrations = self._moved_bytes = self._num_inferences = 0
        self._has_news = False

    def run(self) -> SimulationResult:
        for sample in range(self._rollout.num_samples):
            self._enqueue(sample, has_kv=False)
        self._act(self._policy(self._state()))
        for device in range(self._rollout.num_devices):
            self._interrupt(device)
        while self._events or self._has_news:
            if self._has_news and not (self._events and self._events[0][0] <= self._now_s):
                self._has_news = False  # what happens at one time is one piece of news
                self._act(self._policy(self._state()))
                continue
            time_s, _, kind, device, payload = heapq.heappop(self._events)
            if kind is _EventKind.BOUNDARY and payload != self._engines[device].version:
                continue
            self._now_s = time_s
            if kind is _EventKind.BOUNDARY:
                self._reach_boundary(device)
            elif kind is _EventKind.ARRIVAL:
                self._arrive(device, payload)
            else:
                self._finish_inference(device)
        return self._result()

    # Events

    def _reach_boundary(self, device: int) -> None:
        """Take the planned steps; let finished and leaving samples go, start those that wait, and plan on."""
        engine = self._engines[device]
        for sample in engine.advance(*self._planned[device]):
            self._finish(engine, sample)
        for sample, target in self._leaving[device]:
            if self._phase[sample] == Phase.LEAVING:  # it has not finished meanwhile
                self._depart(engine, sample, target)
        self._leaving[device].clear()

        for sample in engine.admit():
            self._phase[sample] = Phase.RUNNING
            self._entered[sample], self._entered_s[sample] = engine.num_steps, self._now_s
            self._in_batch[sample] = self._started[sample] = True
        if engine.batch:
            if self._busy_since_s[device] is None:
                self._busy_since_s[device] = self._now_s
            self._plan(device, *engine.next_change())
        else:
            self._end_span(device, SpanKind.GENERATE)
            self._start_inference(device)

    def _finish(self, engine: SimulatedEngine, sample: int) -> None:
        tokens = int(self._rollout.response_tokens[sample])
        assert self._tokens[sample] + engine.num_steps - self._entered[sample] == tokens, "tokens were lost"
        engine.remove(sample, int(self._rollout.prompt_tokens[sample]) + tokens)
        self._tokens[sample] = tokens
        self._leave_batch(sample)
        self._phase[sample] = Phase.FINISHED
        self._count_live(sample, int(self._home[sample]), -1)
        self._generation_s = self._now_s
        self._has_news = True

    def _depart(self, engine: SimulatedEngine, sample: int, target: int) -> None:
        """Send a sample on its way; one that has not started has nothing to be moved."""
        delay_s, has_kv = self._costs.hand_out_s, False
        if self._in_batch[sample]:
            self._tokens[sample] += engine.num_steps - self._entered[sample]
            self._leave_batch(sample)
        context = int(self._rollout.prompt_tokens[sample] + self._tokens[sample])
        engine.remove(sample, context)
        if self._started[sample]:
            cost = cheaper_migration(self._costs, context, can_transfer=self._rollout.can_transfer)
            has_kv = cost.kind is MigrationKind.TRANSFER
            delay_s += cost.seconds if has_kv else 0.0  # recomputing takes its time on the target
            self._moved_bytes += cost.num_bytes
            self._num_migrations += 1
        self._phase[sample] = Phase.TRAVELLING
        self._schedule(self._now_s + delay_s, _EventKind.ARRIVAL, target, 2 * sample + has_kv)

    def _leave_batch(self, sample: int) -> None:
        self._in_batch[sample] = False
        span = SampleSpan(sample, int(self._host[sample]), self._entered_s[sample], self._now_s)
        self._sample_spans.append(span)

    def _arrive(self, device: int, payload: int) -> None:
        sample, has_kv = divmod(payload, 2)
        assert self._phase[sample] == Phase.TRAVELLING
        self._phase[sample], self._host[sample] = Phase.WAITING, device
        self._enqueue(sample, has_kv=bool(has_kv))
        self._interrupt(device)

    def _start_inference(self, device: int) -> None:
        job = self._jobs[device]
        if job is not None and self._engines[device].is_empty:
            self._scoring[device], self._busy_since_s[device] = True, self._now_s
            seconds = self._costs.hand_out_s + self._costs.inference(int(self._inferring_tokens[device]))
            self._schedule_end(self._now_s + seconds, device)

    def _finish_inference(self, device: int) -> None:
        job = self._jobs[device]
        assert job is not None
        for sample in job.samples:
            assert self._phase[sample] == Phase.INFERRING, "a sample was scored twice"
            self._phase[sample] = Phase.SCORED
        self._jobs[device], self._scoring[device] = None, False
        self._inferring_tokens[device] = 0
        self._end_span(device, SpanKind.INFER)
        self._has_news = True
        self._interrupt(device)

    # The engines' plans

    def _enqueue(self, sample: int, *, has_kv: bool) -> None:
        tokens = int(self._tokens[sample])
        self._engines[self._host[sample]].enqueue(
            sample,
            int(self._rollout.prompt_tokens[sample]) + tokens,
            int(self._rollout.response_tokens[sample]) - tokens,
            int(self._reserved[sample]),
            has_kv=has_kv,
            prompt=int(self._prompts[sample]),
            is_new=not tokens,
        )

    def _interrupt(self, device: int) -> None:
        """Let the engine's batch change at its next boundary; while the device scores, once that is done."""
        if not self._scoring[device]:
            self._plan(device, *self._engines[device].next_boundary(self._now_s))

    def _plan(self, device: int, steps: int, end_s: float) -> None:
        engine = self._engines[device]
        engine.version += 1
        self._planned[device] = (steps, end_s)
        self._step_base[device], self._resumed_s[device] = engine.num_steps, engine.resumed_s
        # Steps of an empty batch count for nothing, but must take time.
        self._first_step_s[device], self._growth_s[device] = engine.first_step_s() or 1.0, engine.growth_s()
        self._schedule(end_s, _EventKind.BOUNDARY, device, engine.version)

    def _schedule(self, time_s: float, kind: _EventKind, device: int, payload: int) -> None:
        heapq.heappush(self._events, (time_s, next(self._event_order), kind, device, payload))

    def _schedule_end(self, time_s: float, device: int) -> None:
        """Of what the device does in place of decoding."""
        self._schedule(time_s, _EventKind.SCORED, device, 0)

    def _end_span(self, device: int, kind: SpanKind) -> None:
        start_s = self._busy_since_s[device]
        if start_s is not None:
            self._timeline[device].append(BusySpan(kind, start_s, self._now_s))
            self._busy_since_s[device] = None

    # The policy

    def _state(self) -> RolloutState:
        live = np.flatnonzero(self._phase <= Phase.TRAVELLING)
        steps = self._complete_steps()[self._host[live]] - self._entered[live]
        tokens = self._tokens[live] + np.where(self._in_batch[live], steps, 0)
        generated = self._tokens.copy()
        generated[live] = np.minimum(tokens, self._rollout.response_tokens[live] - 1)
        num_devices = self._rollout.num_devices
        columns = SampleColumns(
            self._prompts, self._rollout.prompt_tokens, self._home, self._phase, generated, self._tokens, self._started
        )
        return columns.state(
            self._rollout.limits,
            released=self._released,
            inferring_tokens=self._inferring_tokens,
            inferring_left=[self._left_to_score(device) for device in range(num_devices)],
            lost=[False] * num_devices,
        )

    def _left_to_score(self, device: int) -> float:
        if self._jobs[device] is None:
            return 0.0
        since_s = self._busy_since_s[device] if self._scoring[device] else None
        elapsed_s = 0.0 if since_s is None else self._now_s - since_s
        return left_to_score(self._costs, int(self._inferring_tokens[device]), elapsed_s)

    def _complete_steps(self) -> Ints:
        """Steps that each engine has done by now, [devices]; as `SimulatedEngine.next_boundary`, for all at once."""
        elapsed_s = np.maximum(0.0, self._now_s - self._resumed_s)
        half_growth = self._growth_s / 2
        linear = self._first_step_s - half_growth
        steps = 2 * elapsed_s / (linear + np.sqrt(linear**2 + 4 * half_growth * elapsed_s))
        complete: Ints = self._step_base + np.floor(steps + 1e-9).astype(np.int64)
        return complete

    def _act(self, actions: Sequence[Action]) -> None:
        interrupted: dict[int, None] = {}
        for action in actions:
            if isinstance(action, Migrate):
                self._migrate(action)
                interrupted[action.source] = None
            elif isinstance(action, Release):
                assert not self._num_live[action.device], f"device {action.device} is released with live samples"
                self._released[action.device] = True
            else:
                self._infer(action)
                interrupted[action.device] = None
        for device in interrupted:
            self._interrupt(device)

    def _migrate(self, action: Migrate) -> None:
        sample, limits = action.sample, self._rollout.limits
        assert self._phase[sample] in (Phase.WAITING, Phase.RUNNING), f"sample {sample} cannot be moved"
        assert self._host[sample] == action.source != action.target, f"sample {sample} is not on {action.source}"
        self._phase[sample], self._home[sample] = Phase.LEAVING, action.target
        self._leaving[action.source].append((sample, action.target))
        self._count_live(sample, action.source, -1)
        self._count_live(sample, action.target, 1)
        assert self._num_live[action.target] <= limits.max_batch, f"engine {action.target} is over its batch"
        assert self._live_kv[action.target] <= limits.kv_capacity_tokens, f"engine {action.target} is over its KV"
        self._released[action.target] = False

    def _infer(self, action: Infer) -> None:
        device = action.device
        assert self._released[device], f"device {device} is to infer before it is released"
        assert self._jobs[device] is None, f"device {device} is to infer twice at once"
        for sample in action.samples:
            assert self._phase[sample] == Phase.FINISHED, f"sample {sample} is not ready to be scored"
            self._phase[sample] = Phase.INFERRING
        samples = list(action.samples)
        self._jobs[device] = action
        tokens = self._rollout.prompt_tokens[samples] + self._rollout.response_tokens[samples]
        self._inferring_tokens[device] = int(tokens.sum())
        self._num_inferences += 1

    def _count_live(self, sample: int, device: int, change: int) -> None:
        self._num_live[device] += change
        self._live_kv[device] += change * int(self._reserved[sample])

    def _result(self) -> SimulationResult:
        lost = np.flatnonzero(self._phase != Phase.SCORED)
        assert not len(lost), f"samples {lost[:5].tolist()} were never scored"
        assert not self._num_live.any()
        busy_s = sum(span.end_s - span.start_s for spans in self._timeline for span in spans)
        return SimulationResult(
            makespan_s=self._now_s,
            generation_s=self._generation_s,
            idle_share=1 - busy_s / (self._now_s * self._rollout.num_devices),
            num_migrations=self._num_migrations,
            moved_bytes=self._moved_bytes,
            num_inferences=self._num_inferences,
            prefill_tokens=sum(engine.prefill_tokens for engine in self._engines),
            peak_batch=max(engine.peak_batch for engine in self._engines),
            peak_kv_tokens=max(engine.peak_kv_tokens for engine in self._engines),
            timeline=tuple(map(tuple, self._timeline)),
            samples=tuple(self._sample_spans),
        )
