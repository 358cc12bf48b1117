"""What is trained before all samples are known: the same step, whoever trains what of it, and in what order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fuse.algorithms.algorithm import Algorithm
from fuse.algorithms.estimators import EstimatorSettings
from fuse.algorithms.gae import GAESettings
from fuse.algorithms.group_batch import GroupSettings
from fuse.algorithms.grpo_loss import GRPOLossSettings, grpo_loss
from fuse.algorithms.policy_gradient import policy_gradient
from fuse.algorithms.ppo import PPOSettings, ppo
from fuse.algorithms.surrogates import SurrogateSettings
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import place
from fuse.intrastage.training_schedule import Plan, serial_schedule
from fuse.sample import Group, Sample, SampleState, SpecialTokens
from fuse.trace import SpanRecorder
from fuse.training.layout import RaggedLayout
from fuse.training.model_spec import ModelSpec
from fuse.training.rank import TAIL, TrainingRank, TrainingSettings
from fuse.training.regrouping import drawn_metrics, prepared
from fuse.training.rounds import RankRound, Round, rounds, step_reports
from fuse.training.steps import StepReport, optimizer_steps
from fuse.training.tail import FirstStep

from ..distributed.fake_nccl import FakeNccl
from ..tiny_models import build, classifier, language_model, spread

SPECIAL = SpecialTokens(pad=0, eos=(1,), stop=(1,))
LENGTHS = (3, 1, 4, 2, 6, 5, 3, 2, 7, 4, 1, 3)
GROUP = 3
MODELS = {
    "actor": spread(build(language_model(num_hidden_layers=2))),
    "critic": spread(build(classifier(num_hidden_layers=2))),
}


def samples() -> list[Sample]:
    """Scored ones, in groups."""
    random = np.random.default_rng(0)
    made = []
    for index, length in enumerate(LENGTHS):
        sample = Sample(index, tuple(random.integers(2, 60, size=2 + index % 3).tolist()))
        sample.group, sample.length = Group(index // GROUP, GROUP), length
        sample.response_ids = random.integers(2, 60, size=length).tolist()
        sample.logprobs = (-4 + random.random(length)).tolist()
        sample.reference_logprobs = np.array(sample.logprobs, dtype=np.float32) - 0.1
        sample.values = random.random(length + 1).astype(np.float32)
        sample.score = float(random.random())
        sample.rewards = [sample.score]
        sample.state = SampleState.SCORED
        made.append(sample)
    return made


def without_critic(loss_type: str, **options: Any) -> Algorithm:
    group = GroupSettings(
        num_generations=GROUP, rollout_size=len(LENGTHS), reward_names=("reward",), reward_weights=(1.0,)
    )
    loss = GRPOLossSettings(
        temperature=1.0,
        loss_type=loss_type,
        level="token",
        surrogate=SurrogateSettings(epsilon_low=0.2, epsilon_high=0.2),
        beta=0.1,
        weighs_kl=False,
        is_on_policy=False,
        max_tokens=8,
        micro_batches_per_rollout=6,
    )
    over: Any = {"dapo": "rollout", "bnpo": "micro_batch"}.get(loss_type, "samples")
    of_group = EstimatorSettings(group=group, **options)
    return policy_gradient("group", of_group, partial(grpo_loss, settings=loss), SPECIAL, mean_over=over)


def with_critic(**options: Any) -> Algorithm:
    gae = GAESettings(
        kl_coef=0.05, kl_estimator="k1", whiten_rewards=False, gamma=1.0, lam=0.95, missing_eos_penalty=None
    )
    return ppo(
        PPOSettings(gae=gae, temperature=1.0, cliprange=0.2, vf_coef=0.1, cliprange_value=0.2, **options), SPECIAL
    )


ALGORITHMS: Mapping[str, Algorithm] = {
    "rollout": without_critic("dapo"),
    "samples": without_critic("grpo"),
    "micro-batches": without_critic("bnpo"),
    "critic": with_critic(),
    "critic, by tokens": with_critic(loss_normalization="token"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One optimizer step of the role that trains early, on all samples in a drawn order."""

    algorithm: Algorithm
    num_ranks: int
    num_stages: int
    num_mini_batches: int = 1

    @property
    def role(self) -> str:
        assert self.algorithm.early is not None
        return self.algorithm.early.role

    @property
    def num_replicas(self) -> int:
        return self.num_ranks // self.num_stages

    @property
    def drawn(self) -> list[Round]:
        order = np.random.default_rng(1).permutation(len(LENGTHS))
        steps = optimizer_steps([order], num_mini_batches=self.num_mini_batches, micro_batch_size=2)
        return rounds({self.role: steps}, {self.role: self.num_replicas}, is_fused=False)

    def first_step(self) -> FirstStep:
        members = [range(index // GROUP * GROUP, (index // GROUP + 1) * GROUP) for index in range(len(LENGTHS))]
        step = FirstStep.of(self.algorithm.early, self.drawn, members) if self.algorithm.early else None
        assert step is not None
        return step

    def run(self, pieces: Sequence[tuple[int, Sequence[int], int]]) -> tuple[dict[str, Tensor], list[StepReport]]:
        """Weights and reports of a step. pieces: (replica, samples, width known) of what is trained early."""
        algorithm, role, step = self.algorithm, self.role, self.first_step()
        whole, _ = algorithm.estimate(samples())
        for replica, own, width in pieces:
            halves = [tuple(one) for one in np.array_split(np.array(own), 2) if len(one)]
            known = set(own) | set(range(6))
            assert set(own) <= set(step.ready(known))
            step.take(replica, [tuple(map(int, half)) for half in halves], samples(), width)
        placement = place(role, self.num_ranks, self.num_stages)
        training = TrainingSettings(
            backend="transformers",
            split_backward=False,
            losses=algorithm.losses,
            targets=algorithm.targets,
            layout=RaggedLayout(),
            adamw=AdamWConfig(max_grad_norm=0.1),
            autocast=None,
            gradient_checkpointing=False,
            timeout_s=30.0,
            loss_normalization=algorithm.loss_normalization,
            units=algorithm.units,
        )
        of_update = prepared(self.drawn, whole, loss_normalization=algorithm.loss_normalization, units=algorithm.units)
        scale = 1.0
        if pieces:
            scale = step.scale(whole, self.drawn)
            of_update = step.rest(whole, self.drawn, of_update, num_replicas=self.num_replicas, halves=False)
        plans = {one.counts: Plan(serial_schedule(placement, one.counts)).for_ranks for one in of_update}

        def run(rank: int) -> tuple[list[RankRound], dict[str, Tensor], int]:
            recorder = SpanRecorder()
            held = TrainingRank(
                rank, torch.device("cpu"), {role: ModelSpec.of(MODELS[role])}, placement, training, recorder
            )
            held.load_weights(role, MODELS[role].state_dict())
            nothing = RankRound(metrics={}, gradient_norms={}, said={role: ()})
            told = []
            for piece in step.pieces:
                is_mine = rank in placement[piece.replica].ranks
                one = held.accumulate(role, piece.replica, piece.experience, piece.part) if is_mine else nothing
                told.append(replace(one, said={role: one.said.get(role, ())}))
            held.scale_gradients(role, scale)
            told += held.train(whole, of_update, [{role: 1e-2}] * len(of_update), plans)
            return told, held.export_weights(role), sum(span.category == TAIL for span in recorder.drain())

        found = FakeNccl(self.num_ranks, 64).run(run)
        everything = [*(step.early_rounds(whole, self.drawn) if pieces else ()), *of_update]
        weights = {name: weight for _, of_rank, _ in found for name, weight in of_rank.items()}
        metrics = partial(drawn_metrics, algorithm.losses, partial(training.layout.micro_batches, whole), whole)
        assert sum(count for _, _, count in found) == 2 * self.num_stages * sum(
            len(piece.micro_batches) for piece in step.pieces
        )
        return weights, step_reports(everything, [told for told, _, _ in found], placement, metrics)[role]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(("num_ranks", "num_stages"), [(1, 1), (4, 2)])
def test_a_step_is_the_same_in_whatever_order_it_is_trained(name: str, num_ranks: int, num_stages: int) -> None:
    """Groups 0 and 1 are known first; of samples the last replica trains some early, and the first others."""
    case = Case(ALGORITHMS[name], num_ranks, num_stages)
    ready = case.first_step().ready(set(range(6)))
    middle = len(ready) // 2
    expected, reported = case.run([])
    pieces = [(case.num_replicas - 1, ready[:middle], 7), (0, ready[middle:], 7)]
    found, found_reported = case.run([piece for piece in pieces if piece[1]])
    assert ready
    for key, weight in expected.items():
        assert float((found[key] - weight).abs().max()) < 4e-6, key
    for one, other in zip(found_reported, reported, strict=True):
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
        for row, other_row in zip(one.metrics, other.metrics, strict=True):
            assert {metric: row[metric] for metric in row} == pytest.approx(dict(other_row), rel=1e-4, abs=1e-6)
    assert any(not torch.equal(weight, MODELS[case.role].state_dict()[key]) for key, weight in expected.items())


def test_what_was_trained_on_something_else_is_noticed() -> None:
    """A value after the last of 6 tokens counts in a batch of 7, and not in one that is taken to have no more."""
    case = Case(ALGORITHMS["critic, by tokens"], 1, 1)
    ready = case.first_step().ready(set(range(6)))
    assert any(LENGTHS[sample] == 6 for sample in ready)
    with pytest.raises(AssertionError, match="other positions"):
        case.run([(0, ready, 6)])


@pytest.mark.parametrize("halves", [False, True])
def test_replicas_are_dealt_as_many_micro_batches_of_the_rest(halves: bool) -> None:
    """No fewer than were drawn of as many samples; an odd number would have one replica wait for the other."""
    case = Case(ALGORITHMS["critic, by tokens"], num_ranks=4, num_stages=2)
    whole, _ = case.algorithm.estimate(samples())
    of_update = prepared(case.drawn, whole, loss_normalization="token", units=case.algorithm.units)
    for num_trained in range(1, 11):
        step = case.first_step()
        step.take(0, [(sample,) for sample in range(num_trained)], samples(), max(LENGTHS))
        (rest,) = step.rest(whole, case.drawn, of_update, num_replicas=2, halves=halves)
        micro_batches = rest.parts[case.role].micro_batches
        num_left = len(LENGTHS) - num_trained
        assert num_left / 2 <= len(micro_batches) <= num_left
        assert len(micro_batches) in (num_left, 2, 4, 6)
