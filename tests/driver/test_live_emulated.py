"""The live controller against the simulator, on the same lengths and costs: one policy, two worlds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.emulated.h100 import costs_named
from fuse.interstage.adaptive import Adaptive
from fuse.interstage.few_pipelines import OnFewPipelines, on_few_pipelines
from fuse.interstage.lengths import Observation, learn
from fuse.interstage.migration import (
    Action,
    EngineLimits,
    Infer,
    Migrate,
    Policy,
    RolloutState,
    StageByStage,
    Threshold,
)
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.simulate_tail import TailWork, simulate_tail
from fuse.interstage.speculation import DRAFTS
from fuse.interstage.tail import Sharing, TailSettings

from .emulated_workers import roll_out, roll_out_with_training

COSTS = costs_named("h100-13b-33b")
NUM_SAMPLES, LONGEST = 96, 400


def lengths(seed: int) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(4.0, 0.9, NUM_SAMPLES)
    return [int(one) for one in np.clip(drawn, 1, LONGEST)]


def rollout(seed: int = 1, costs: EmulatedCosts = COSTS) -> Rollout:
    return Rollout(
        prompt_tokens=np.full(NUM_SAMPLES, 64),
        response_tokens=np.array(lengths(seed)),
        num_devices=4,
        costs=costs.rollout,
        limits=EngineLimits(max_batch=NUM_SAMPLES, kv_capacity_tokens=1 << 20, max_new_tokens=LONGEST),
        can_transfer=False,
    )


@dataclass(slots=True)
class Heard:
    """A policy, and what it decided."""

    policy: Policy
    actions: list[Action] = field(default_factory=list)
    evens_out: bool = True

    def __call__(self, state: RolloutState) -> list[Action]:
        actions = self.policy(state)
        self.actions += actions
        return actions

    def count(self, kind: type) -> int:
        return sum(isinstance(action, kind) for action in self.actions)


def adaptive(costs: EmulatedCosts = COSTS) -> Policy:
    return Adaptive(costs.rollout, learn(map(Observation, lengths(0)), LONGEST).for_samples(), can_transfer=False)


def adaptive_on_pairs() -> Policy:
    return on_few_pipelines(adaptive(), ((0, 1), (2, 3)), COSTS.rollout, can_transfer=False)


POLICIES = [StageByStage(), Threshold(remaining=20, num_kept=1), adaptive()]


@pytest.mark.parametrize(
    "policy", [*POLICIES, adaptive_on_pairs()], ids=["none", "threshold", "adaptive", "on few pipelines"]
)
def test_decisions_are_the_simulators(policy: Policy) -> None:
    """Where the controller hears of tokens as soon as there are any."""
    simulated, real = Heard(policy), Heard(policy)
    expected = simulate(rollout(), simulated)
    report, _ = roll_out(rollout(), COSTS, real, poll_s=1e-3)
    assert real.actions == simulated.actions
    assert real.count(Migrate) or not isinstance(policy, OnFewPipelines)
    assert report.makespan_s == pytest.approx(expected.makespan_s, rel=1e-4)
    assert report.generation_s == pytest.approx(expected.generation_s, rel=1e-4)


@pytest.mark.parametrize("policy", POLICIES, ids=["none", "threshold", "adaptive"])
def test_messages_cost_little_and_are_few(policy: Policy) -> None:
    """Engines tell when samples finish, and now and then; pieces are scored, and samples moved, by one call each."""
    simulated, real = Heard(policy), Heard(policy)
    sent = replace(rollout(), costs=replace(COSTS.rollout, hand_out_s=2e-3))
    expected = simulate(sent, simulated)
    report, num_calls = roll_out(rollout(), COSTS, real, message_s=1e-3)
    assert report.makespan_s == pytest.approx(expected.makespan_s, rel=0.02)
    for tokens, seconds in report.scoring_calls:
        assert seconds == pytest.approx(COSTS.rollout.inference(tokens) + 2e-3)
    assert num_calls["infer"] == real.count(Infer)
    assert num_calls["submit"] == 4
    assert num_calls["poll"] <= NUM_SAMPLES + 4 * report.makespan_s / 0.25 + num_calls["evict"] + num_calls["admit"]
    assert num_calls["evict"] <= real.count(Migrate)


def test_rollouts_whose_engines_draft_take_about_as_long_as_simulated() -> None:
    """Samples are as lucky with their drafts as the seed has it, so decisions are those of about the same states."""
    drafting = replace(COSTS, speculation=DRAFTS["int8"])
    seconds = []
    for costs in (COSTS, drafting):
        case, policy = rollout(costs=costs), adaptive(costs)
        expected = simulate(case, policy)
        report, _ = roll_out(case, costs, policy, poll_s=1e-3)
        assert report.makespan_s == pytest.approx(expected.makespan_s, rel=0.03)
        seconds.append(report.makespan_s)
    assert seconds[1] < 0.95 * seconds[0]


@pytest.mark.parametrize("num_stages", [2, 4])
def test_pipelines_train_as_simulated(num_stages: int) -> None:
    """Of two pipelines one is free at last; one over all devices trains beside the last samples, where that pays."""
    case, policy = rollout(), adaptive() if num_stages == 4 else adaptive_on_pairs()
    plain = simulate(case, adaptive())
    for sharing in (None, Sharing(decoding=1.3, training=1.2)):
        num_replicas = 4 // num_stages
        settings = TailSettings(
            micro_batch_size=2, num_stages=num_stages, num_kept=num_replicas, num_replicas=num_replicas, sharing=sharing
        )
        work = TailWork(groups=np.arange(NUM_SAMPLES), token_s=5e-5, micro_batch_s=1e-3, settings=settings)
        expected = simulate_tail(case, policy, work)
        report, num_trained = roll_out_with_training(case, COSTS, adaptive(), work)
        assert (num_trained > 0) == (expected.num_trained > 0) == (num_stages == 2 or sharing is not None)
        assert report.makespan_s == pytest.approx(expected.rollout.makespan_s, rel=0.03)
        assert report.makespan_s < 1.15 * plain.makespan_s


@pytest.mark.parametrize("num_stages", [1, 4])
def test_a_tail_that_is_long_enough_hides_what_may_train(num_stages: int) -> None:
    """One sample of ten times as many tokens; by replicas that are free, or by a pipeline beside it."""
    longest = 10 * LONGEST
    tokens = np.array(lengths(1))
    tokens[5] = longest
    limits = replace(rollout().limits, max_new_tokens=longest)
    case = replace(rollout(), response_tokens=tokens, limits=limits)
    past = learn(map(Observation, [*lengths(0)[1:], longest]), longest)
    policy = Adaptive(COSTS.rollout, past.for_samples(), can_transfer=False)
    num_replicas = 4 // num_stages
    settings = TailSettings(
        micro_batch_size=2,
        num_stages=num_stages,
        num_kept=num_replicas,
        num_replicas=num_replicas,
        sharing=Sharing(decoding=1.1, training=1.1),
    )
    work = TailWork(groups=np.arange(NUM_SAMPLES), token_s=5e-5, micro_batch_s=1e-3, settings=settings)
    plain_s, expected = simulate(case, policy).makespan_s, simulate_tail(case, policy, work)
    report, num_trained = roll_out_with_training(case, COSTS, policy, work)
    for trained, seconds in ((expected.num_trained, expected.rollout.makespan_s), (num_trained, report.makespan_s)):
        assert trained >= 0.8 * NUM_SAMPLES
        assert seconds < 1.05 * plain_s
