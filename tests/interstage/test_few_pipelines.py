"""Pipelines come free as wholes where that pays: which samples move where, and what is trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import LLAMA_33B_8_H800, CostModel
from fuse.interstage.few_pipelines import on_few_pipelines
from fuse.interstage.lengths import Observation, learn
from fuse.interstage.migration import (
    Action,
    EndedSamples,
    EngineLimits,
    LiveSamples,
    Migrate,
    Policy,
    RolloutState,
    StageByStage,
)
from fuse.interstage.rollout import BusySpan, Rollout, SimulationResult, SpanKind
from fuse.interstage.simulate import simulate
from fuse.interstage.simulate_tail import TailWork, simulate_tail
from fuse.interstage.tail import TailSettings

PAIRS = ((0, 1), (2, 3))
COSTS = LLAMA_33B_8_H800


@dataclass(frozen=True, slots=True)
class Waiting:
    """A policy that moves nothing and expects the last sample to end in so many seconds."""

    seconds: float = 10.0

    def __call__(self, state: RolloutState) -> list[Action]:
        return []

    def spare_s(self, state: RolloutState) -> float:
        return self.seconds


def state(
    devices: Sequence[int], *, scoring: Sequence[int] = (), lost: Sequence[int] = (), moving: bool = False
) -> RolloutState:
    """Samples 0, 1, ... on these devices, and 100 that have ended."""
    count = len(devices)
    return RolloutState(
        limits=EngineLimits(max_batch=2, kv_capacity_tokens=4096, max_new_tokens=1024),
        live=LiveSamples(
            ids=np.arange(count),
            devices=np.array(devices),
            prompt_tokens=np.full(count, 100),
            response_tokens=np.full(count, 500),
            started=np.ones(count, dtype=np.bool_),
            movable=np.full(count, not moving),
            prompts=np.arange(count),
        ),
        ended=EndedSamples(prompts=np.arange(100), response_tokens=np.full(100, 300)),
        finished_ids=np.array([], dtype=np.int64),
        finished_tokens=np.array([], dtype=np.int64),
        released=np.isin(np.arange(4), scoring),
        inferring_tokens=np.isin(np.arange(4), scoring) * 1000,
        inferring_left=np.where(np.isin(np.arange(4), scoring), 500.0, 0.0),
        lost=np.isin(np.arange(4), lost),
    )


def moves(seen: RolloutState, policy: Policy | None = None, costs: CostModel = COSTS) -> list[tuple[int, int, int]]:
    actions = on_few_pipelines(Waiting() if policy is None else policy, PAIRS, costs)(seen)
    return [(one.sample, one.source, one.target) for one in actions if isinstance(one, Migrate)]


def test_a_pipeline_is_emptied_onto_free_engines_of_others() -> None:
    assert moves(state([0, 2])) == [(0, 0, 3)]
    assert moves(state([1, 1, 2])) == [(2, 2, 0)], "the fewest samples move, to the pipeline with more"
    assert moves(state([0, 1, 2])) == [], "no engine is free in either of two for what the other has"
    assert moves(state([2, 3])) == [], "one of them is free"


def test_samples_stay_where_moving_them_would_not_pay() -> None:
    assert moves(state([0, 2]), Waiting(seconds=0.01)) == [], "it would soon be free"
    assert moves(state([0, 2]), costs=replace(COSTS, hand_out_s=2.0)) == [], "moves take long"
    idle = state([0, 2])
    nothing = replace(idle, ended=EndedSamples(prompts=np.array([]), response_tokens=np.array([])))
    assert moves(nothing) == [], "there is nothing to train"
    assert moves(state([0, 2]), StageByStage()) == [], "the policy knows no costs"


def test_samples_go_only_where_they_can_be_at_once() -> None:
    assert moves(state([0, 2], scoring=[1, 3])) == [], "free engines score"
    assert moves(state([0, 2], scoring=[1])) == [(0, 0, 3)]
    assert moves(state([0, 2], lost=[1, 3])) == [], "free engines have died"
    assert moves(state([0, 2], moving=True)) == [], "what is on the way arrives first"
    assert moves(state([0, 2, 2, 2])) == [(0, 0, 3)]
    assert moves(state([0, 0, 0, 2, 2, 2])) == [], "more than an engine holds at once"


def test_a_policy_is_itself_where_all_pipelines_are_alike() -> None:
    policy = Waiting()
    for pipelines in ([(0,), (1,)], [(0, 1, 2, 3)]):
        assert on_few_pipelines(policy, pipelines, COSTS) is policy
    assert on_few_pipelines(policy, PAIRS, None) is policy, "costs are not known yet"


def test_pipelines_hide_most_of_what_a_long_tail_has_time_for() -> None:
    """Of 256 samples the four longest, of 4,000 tokens, are on engines of both pipelines of four."""
    tokens = np.random.default_rng(0).integers(50, 400, 256)
    tokens[[0, 1, 6, 7]] = 4000
    rollout = Rollout(
        prompt_tokens=np.full(256, 128),
        response_tokens=tokens,
        num_devices=8,
        costs=COSTS,
        limits=EngineLimits(max_batch=256, kv_capacity_tokens=1 << 22, max_new_tokens=4096),
    )
    policy = Adaptive(COSTS, learn(map(Observation, tokens.tolist()), 4096).for_samples())
    settings = TailSettings(micro_batch_size=4, num_stages=4, num_kept=2, num_replicas=2)
    work = TailWork(
        groups=np.arange(256), token_s=COSTS.inference_token_s, micro_batch_s=COSTS.inference_s, settings=settings
    )
    plain = simulate(rollout, policy)
    together = on_few_pipelines(policy, [range(4), range(4, 8)], COSTS)
    apart, found = (simulate_tail(rollout, one, work) for one in (policy, together))
    all_tokens = int((rollout.prompt_tokens + tokens).sum())
    assert plain.idle_s(4) > COSTS.inference_token_s * all_tokens, "the tail is long enough"
    assert apart.trained_tokens < 0.1 * all_tokens
    assert found.trained_tokens > 0.8 * all_tokens
    assert found.rollout.makespan_s < 1.01 * plain.makespan_s


def test_idle_time_of_whole_pipelines() -> None:
    """Three devices of four are busy for 1 s, then two, then none: of pairs none is idle, then one, then both."""
    busy = [[(0.0, 1.0), (1.0, 2.0)], [], [(0.0, 1.0)], [(0.0, 2.0)]]
    result = SimulationResult(
        makespan_s=3.0,
        generation_s=3.0,
        idle_share=0.0,
        num_migrations=0,
        moved_bytes=0,
        num_inferences=0,
        prefill_tokens=0,
        peak_batch=0,
        peak_kv_tokens=0,
        timeline=tuple(tuple(BusySpan(SpanKind.GENERATE, *span) for span in own) for own in busy),
        samples=(),
    )
    assert result.idle_s(1) == pytest.approx(1 + 2 + 4)
    assert result.idle_s(2) == pytest.approx(0 + 2 + 4)
    assert result.idle_s(4) == pytest.approx(4)
