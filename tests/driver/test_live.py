"""Whatever the policy and the order of events, and whoever dies: each sample is generated and scored once, the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuse.driver import live
from fuse.driver.live import LiveRollout
from fuse.driver.rollout_state import RolloutReport
from fuse.driver.stage_by_stage import progress_text
from fuse.engines.engine import SamplingParams
from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import SMALL_CPU
from fuse.interstage.lengths import learn
from fuse.interstage.migration import (
    Action,
    EngineLimits,
    Infer,
    Migrate,
    Policy,
    Release,
    RolloutState,
    StageByStage,
    Threshold,
    evens_out,
    feed,
)
from fuse.sample import Sample, SampleState
from fuse.workers.errors import WorkerError
from fuse.workers.generation_worker import GenerationWorker

from .fake_workers import FLOW_ROLES, Chance, FakeEngine, FakeFuture, FakeScorer, token, use_chance

MAX_NEW_TOKENS = 24
FIRST_ID = 1000
LIMITS = EngineLimits(max_batch=8, kv_capacity_tokens=8 * 32, max_new_tokens=MAX_NEW_TOKENS)


@dataclass(slots=True)
class Wanderlust:
    """Moves samples anywhere for no reason, within the contract of policies, and scores what it can."""

    random: np.random.Generator
    calls: int = field(default=0)

    def __call__(self, state: RolloutState) -> list[Action]:
        self.calls += 1
        counts, moves = state.num_live(), []
        for sample, device, movable in zip(state.live.ids, state.live.devices, state.live.movable, strict=True):
            target = int(self.random.integers(state.num_devices))
            room = counts[target] < state.limits.max_batch and not state.lost[target]
            if movable and target != device and room and not state.inferring_tokens[target] and self.calls < 200:
                moves.append(Migrate(int(sample), int(device), target))
                counts[device] -= 1
                counts[target] += 1
        return [*moves, *feed(state, moves)]


@dataclass(slots=True)
class Checked:
    """A policy that is shown what one finds by looking all samples up, to the last of them."""

    policy: Policy
    rollout: LiveRollout

    @property
    def evens_out(self) -> bool:
        return evens_out(self.policy)

    def __call__(self, state: RolloutState) -> list[Action]:
        samples, home = self.rollout._table.samples, self.rollout._table.home
        live = [index for index, sample in enumerate(samples) if sample.id in home]
        ended = [index for index in range(len(samples)) if index not in live]
        backlog = [index for index in ended if samples[index].state is SampleState.GENERATED]
        tokens = [len(sample.response_ids) for sample in samples]
        assert state.live.ids.tolist() == live
        assert state.live.devices.tolist() == [home[samples[index].id] for index in live]
        assert state.live.response_tokens.tolist() == [tokens[index] for index in live]
        assert state.live.started.tolist() == [tokens[index] > 0 for index in live]
        assert state.live.movable.tolist() == [samples[index].state is SampleState.GENERATING for index in live]
        assert state.ended.response_tokens.tolist() == [tokens[index] for index in ended]
        assert state.finished_ids.tolist() == backlog
        assert state.finished_tokens.tolist() == [3 + samples[index].length for index in backlog]
        assert self.rollout._table.progress_text() == progress_text(samples)
        return self.policy(state)


def policies(seed: int) -> list[Policy]:
    return [
        StageByStage(),
        Threshold(remaining=6, num_kept=1),
        Adaptive(SMALL_CPU, learn([], MAX_NEW_TOKENS).for_samples()),
        Wanderlust(np.random.default_rng(seed)),
    ]


def roll_out(
    lengths: Sequence[int],
    num_devices: int,
    policy: Policy,
    seed: int,
    num_deaths: int = 0,
    death_rate: float = 0.05,
    silent: Sequence[int] = (),
    flows: bool = False,
    thread_time: Callable[[], float] = time.thread_time,
) -> tuple[RolloutReport, list[Sample], list[int]]:
    by_id = {FIRST_ID + index: length for index, length in enumerate(lengths)}
    engines = [FakeEngine(device, by_id, LIMITS.max_batch) for device in range(num_devices)]
    for device in silent:
        engines[device].is_silent = True
    workers = [FakeScorer(device, engine) for device, engine in enumerate(engines)]
    scorers = [worker.handle for worker in workers]
    samples = [Sample(FIRST_ID + index, (1, 2, 3 + index)) for index in range(len(lengths))]
    announced: list[int] = []
    rollout = LiveRollout(
        [engine.handle for engine in engines],
        lambda: scorers,
        samples,
        SamplingParams(seed=0, temperature=1.0, max_new_tokens=MAX_NEW_TOKENS),
        policy=policy,
        limits=LIMITS,
        flow_roles=FLOW_ROLES if flows else (),
        pad_token_id=0,
        costs=SMALL_CPU,
        on_generated=lambda finished: announced.extend(sample.id for sample in finished),
        timeout_s=1e4 if silent else math.inf,
    )
    rollout._policy = Checked(policy, rollout)
    use_chance(rollout, Chance(seed, engines, num_deaths, death_rate))
    clock = SimpleNamespace(perf_counter=time.perf_counter, monotonic=count().__next__, thread_time=thread_time)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "time", clock)
        report = rollout.run()
    for worker in workers:
        assert worker.pieces == workers[0].pieces, "pieces come in different orders"
        assert bool(worker.pieces) == flows
    return report, samples, announced


def check(lengths: Sequence[int], samples: Sequence[Sample], announced: Sequence[int]) -> None:
    for sample in samples:
        expected = [token(sample.id, position) for position in range(lengths[sample.id - FIRST_ID])]
        assert sample.state is SampleState.SCORED
        assert sample.response_ids == expected
        assert sample.logprobs == [-float(each) for each in expected]
        assert sample.score == 3 + lengths[sample.id - FIRST_ID]
    assert sorted(announced) == [sample.id for sample in samples]


def test_engines_gather_news_for_longer_than_the_driver_takes_to_act_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered, call = [], FakeEngine.call

    def heard(engine: FakeEngine, method: Callable[..., Any], *args: Any) -> FakeFuture:
        if method is GenerationWorker.poll:
            gathered.append(args[1])
        return call(engine, method, *args)

    monkeypatch.setattr(FakeEngine, "call", heard)
    roll_out([5, 9, 2, 24], 2, StageByStage(), seed=0, thread_time=count(0.0, 0.003).__next__)
    assert gathered[0] == 0.0
    assert gathered[-1] == pytest.approx(live._GATHERING * 0.003)


@given(
    lengths=st.lists(st.integers(1, MAX_NEW_TOKENS), min_size=1, max_size=12),
    num_devices=st.integers(1, 4),
    which=st.integers(0, 3),
    seed=st.integers(0, 1 << 20),
    flows=st.booleans(),
)
def test_every_sample_is_generated_and_scored_once(
    lengths: list[int], num_devices: int, which: int, seed: int, flows: bool
) -> None:
    flows &= num_devices > 1
    report, samples, announced = roll_out(lengths, num_devices, policies(seed)[which], seed, flows=flows)
    check(lengths, samples, announced)
    assert report.lost_engines == ()
    assert 0 < report.generation_s <= report.makespan_s
    if which == 0 or num_devices == 1:
        assert report.num_migrations == 0


@pytest.mark.parametrize("which", [0, 2, 3])  # the threshold has all of its samples moved away before
def test_an_engine_that_gives_no_token_for_too_long_is_lost(which: int) -> None:
    lengths = [3, 24, 7, 12, 1, 24]
    report, samples, announced = roll_out(lengths, 3, policies(0)[which], seed=0, silent=[1])
    check(lengths, samples, announced)
    assert report.lost_engines == (1,)
    with pytest.raises(WorkerError, match=r"generation worker on device \d failed: no token within 10000 s"):
        roll_out(lengths, 2, policies(0)[which], seed=0, silent=[0, 1])


@given(
    lengths=st.lists(st.integers(1, MAX_NEW_TOKENS), min_size=1, max_size=12),
    num_devices=st.integers(2, 4),
    which=st.integers(0, 3),
    seed=st.integers(0, 1 << 20),
    flows=st.booleans(),
)
def test_samples_of_an_engine_that_dies_go_on_elsewhere(
    lengths: list[int], num_devices: int, which: int, seed: int, flows: bool
) -> None:
    policy, deaths = policies(seed)[which], num_devices - 1
    _, samples, announced = roll_out(lengths, num_devices, policy, seed, num_deaths=deaths, flows=flows)
    check(lengths, samples, announced)


def test_the_last_engine_to_die_ends_the_rollout() -> None:
    with pytest.raises(WorkerError, match="generation worker on device 0 failed: its process died"):
        roll_out([MAX_NEW_TOKENS] * 4, 1, StageByStage(), seed=1, num_deaths=1, death_rate=1.0)


def test_samples_move_and_are_scored_while_others_decode() -> None:
    lengths = [1, 2, 2, 3, MAX_NEW_TOKENS, MAX_NEW_TOKENS]
    seen: list[RolloutState] = []

    def policy(state: RolloutState) -> list[Action]:
        seen.append(state)
        return Threshold(remaining=4, num_kept=1)(state)

    report, samples, announced = roll_out(lengths, 2, policy, seed=3)
    check(lengths, samples, announced)
    assert report.num_migrations >= 1
    assert any(len(state.live) and state.inferring_tokens.any() for state in seen)
    assert len(report.decision_s) == len(seen)


def test_stage_by_stage_scores_when_all_are_finished() -> None:
    states: list[tuple[int, list[Action]]] = []

    def policy(state: RolloutState) -> list[Action]:
        actions = StageByStage()(state)
        states.append((len(state.live), actions))
        return actions

    lengths = [1, 5, 9, 13]
    _, samples, announced = roll_out(lengths, 2, policy, seed=0)
    check(lengths, samples, announced)
    for num_live, actions in states:
        assert num_live == 0 or actions == []
    assert sum(isinstance(action, Infer) for _, actions in states for action in actions) == 2
    assert sum(isinstance(action, Release) for _, actions in states for action in actions) == 2
