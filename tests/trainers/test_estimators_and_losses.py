"""Whole runs of every algorithm without a critic beside GRPO and RLOO: what they learn from, and that they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fuse import GRPOTrainer, OnlineDPOConfig, OnlineDPOTrainer, ReinforcePlusPlusTrainer, RLOOTrainer
from fuse.algorithms.grpovi import increase_variance
from fuse.engines.replay import ReplayEngine
from fuse.trainers.steps import seeded
from fuse.training.steps import rollout_steps, side_by_side

from . import tiny, tiny_group

LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Of the responses of an update: two groups of four."""


def by_length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1, 4, 9, ... for the first group; in the second all but one are alike."""
    return [float(len(ids) ** 2) if len(ids) < 6 else 36.0 for ids in completion_ids]


REWARDS = torch.tensor([1.0, 4, 9, 16, 25, 36, 36, 36])


def update(output_dir: Path, **options: Any) -> tuple[Any, dict[str, float]]:
    """The trainer and its log after one update on injected responses, which the engine drew with certainty."""
    trainer = tiny_group.trainer(output_dir, rewards=by_length, max_steps=1, stop_token="none", **options)
    recordings = {index: ([3 + index % 5] * length, [0.0] * length) for index, length in enumerate(LENGTHS)}
    # A lambda, for workers do not know this module: it travels to them by value.
    trainer._settings = replace(trainer._settings, engine=lambda *_: ReplayEngine(recordings))
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    return trainer, logged


def whitened(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0)


def over_the_mean(rewards: Tensor) -> Tensor:
    groups = rewards.view(2, 4)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten()


def over_the_others(rewards: Tensor) -> Tensor:
    return over_the_mean(rewards) * 4 / 3


def reinforce(rewards: Tensor) -> Tensor:
    """Of responses: all tokens of one have the same, without a penalty and a discount."""
    lengths = torch.tensor(LENGTHS)
    tokens = whitened(rewards.repeat_interleave(lengths))
    return tokens[lengths.cumsum(0) - 1]


def scaled(advantages: Tensor) -> Tensor:
    return (advantages.view(2, 4) / (advantages.view(2, 4).std(dim=1, keepdim=True) + 1e-4)).flatten()


ON_POLICY: dict[str, tuple[type, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "group": (GRPOTrainer, {}, lambda rewards: scaled(over_the_mean(rewards))),
    "grpo of leave-one-out": (GRPOTrainer, {"advantage": "leave_one_out"}, over_the_others),
    "grpo of reinforce++": (GRPOTrainer, {"advantage": "reinforce++"}, reinforce),
    "reinforce++": (ReinforcePlusPlusTrainer, {"beta": 0.0, "reward_clip_range": None}, reinforce),
    "reinforce++ clipped": (ReinforcePlusPlusTrainer, {"beta": 0.0}, lambda rewards: reinforce(rewards.clamp(max=10))),
    "reinforce++-baseline": (
        ReinforcePlusPlusTrainer,
        {"beta": 0.0, "advantage": "reinforce++-baseline", "reward_clip_range": None},
        lambda rewards: reinforce(over_the_mean(rewards)),
    ),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_the_loss_of_what_the_policy_has_just_drawn(name: str, in_process_workers: None, tmp_path: Path) -> None:
    """All ratios are 1: the loss is the mean of the advantages, over responses, with the other sign."""
    algorithm, options, advantages = ON_POLICY[name]
    _, logged = update(tmp_path, algorithm=algorithm, loss_type="grpo", **options)
    assert logged["loss"] == pytest.approx(-float(advantages(REWARDS).mean()), abs=1e-5)
    assert logged["grad_norm"] > 0


@pytest.mark.parametrize("loss", ["rloo", "proximal_rloo"])
def test_losses_of_whole_responses_clip_their_ratios(loss: str, in_process_workers: None, tmp_path: Path) -> None:
    """The engine says that it was certain, so every ratio is far below 1 and those of bad responses are clipped."""
    trainer, logged = update(tmp_path, algorithm=RLOOTrainer, loss=loss, beta=0.0, epsilon=0.25, adam_epsilon=1e9)
    advantages = over_the_others(REWARDS)
    model, losses = trainer.model, []
    for sample, advantage in zip(sorted_samples(trainer), advantages.tolist(), strict=True):
        ratio = math.exp(logprob(model, *sample))
        losses.append(-min(ratio * advantage, max(0.75, min(1.25, ratio)) * advantage))
    assert logged["loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)


def test_grpovi_weighs_by_the_reference(in_process_workers: None, tmp_path: Path) -> None:
    trainer, logged = update(tmp_path, advantage="grpovi", scale_rewards="none", loss="rloo", adam_epsilon=1e9)
    assert trainer.ref_model is not None, "without a penalty, too"
    logprobs = torch.tensor([logprob(trainer.ref_model, *sample) for sample in sorted_samples(trainer)])
    advantages = over_the_mean(increase_variance(REWARDS, logprobs, 4))
    ratios = logprobs.exp()
    losses = -torch.min(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
    assert logged["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert not torch.allclose(advantages, over_the_mean(REWARDS))


def test_the_penalty_of_reinforce_plus_plus_is_in_the_reward(in_process_workers: None, tmp_path: Path) -> None:
    """Engine and reference differ by the reference's own log-probabilities, for the engine was certain."""
    options = {"algorithm": ReinforcePlusPlusTrainer, "beta": 0.5, "gamma": 0.9, "reward_clip_range": None}
    trainer, logged = update(tmp_path, loss_type="grpo", **options)
    returns = []
    samples = sorted_samples(trainer)
    for (prompt, response), reward in zip(samples, REWARDS.tolist(), strict=True):
        to_come, own = reward, []
        for place in reversed(range(len(response))):
            kl = -token_logprobs(trainer.ref_model, prompt, response)[place]
            to_come = (to_come if place == len(response) - 1 else 0.9 * to_come) - 0.5 * kl
            own.append(to_come)
        returns.append(torch.tensor(own[::-1]))
    advantages = whitened(torch.cat(returns)).split(list(LENGTHS))
    assert logged["loss"] == pytest.approx(-sum(float(one.mean()) for one in advantages) / 8, abs=1e-4)
    assert logged["kl"] > 0


@pytest.mark.parametrize(("loss_type", "expected"), [("sigmoid", math.log(2)), ("ipo", 1 / (2 * 0.4) ** 2)])
def test_the_first_loss_of_online_dpo(
    loss_type: str, expected: float, in_process_workers: None, tmp_path: Path
) -> None:
    """The policy is the reference still. Of four responses to each of four prompts two are trained on."""
    options: dict[str, Any] = {"algorithm": OnlineDPOTrainer, "beta": 0.4, "loss_type": loss_type}
    trainer = tiny_group.trainer(tmp_path, max_steps=1, **options)
    with trainer.updates() as updates:
        iteration = next(updates)
    assert len(iteration.samples) == 16
    assert iteration.metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert iteration.metrics["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    groups = [iteration.samples[first : first + 4] for first in range(0, 16, 4)]
    margins = [max(one.rewards[0] for one in group) - min(one.rewards[0] for one in group) for group in groups]
    assert iteration.metrics["objective/scores_margin"] == pytest.approx(sum(margins) / 4)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": ReinforcePlusPlusTrainer, "num_generations": 1, "per_device_train_batch_size": 8},
        {"algorithm": OnlineDPOTrainer, "num_generations": 4, "beta": 0.1},
    ],
    ids=["reinforce++", "online-dpo"],
)
def test_rewards_rise_on_two_devices(options: dict[str, Any], pooled_workers: None, tmp_path: Path) -> None:
    trainer = tiny_group.train(tmp_path, num_devices=2, max_steps=12, **options)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(rewards[-4:]) > sum(rewards[:4])


@given(
    pairs=st.integers(1, 3), steps=st.integers(1, 3), uses=st.integers(1, 2), num_generations=st.integers(2, 4),
    rollouts=st.integers(1, 2), seed=st.integers(0, 9),
)  # fmt: skip
def test_pairs_are_never_cut(pairs: int, steps: int, uses: int, num_generations: int, rollouts: int, seed: int) -> None:
    """Every micro-batch has whole pairs, the chosen one first, and every pair is used as often as rollouts are."""
    args = OnlineDPOConfig(
        use_cpu=True,
        per_device_train_batch_size=2 * pairs,
        steps_per_generation=steps,
        num_iterations=uses,
        num_generations=num_generations,
        gradient_accumulation_steps=steps * uses * rollouts,
    )
    assert args.rollout_size == pairs * steps * num_generations
    assert (args.rollouts_per_update, args.trained_size) == (rollouts, 2 * pairs * steps)
    order = seeded(seed, args.trained_size // args.num_together)
    taken = rollout_steps(
        [
            index * args.trained_size + side_by_side(order(1, index), args.num_together)
            for index in range(args.rollouts_per_update)
        ],
        micro_batch_size=args.per_device_train_batch_size,
        num_iterations=args.num_iterations,
        accumulation=args.gradient_accumulation_steps,
    )
    used: list[int] = []
    for step in taken:
        for micro_batch in step.micro_batches:
            assert len(micro_batch) == 2 * pairs
            assert all(micro_batch[place] % 2 == 0 for place in range(0, 2 * pairs, 2))
            assert all(micro_batch[place + 1] == micro_batch[place] + 1 for place in range(0, 2 * pairs, 2))
            used += micro_batch
    assert sorted(used) == sorted(list(range(rollouts * args.trained_size)) * uses)


def sorted_samples(trainer: Any) -> list[tuple[tuple[int, ...], list[int]]]:
    """Prompts and responses of the update, as they were injected."""
    (batch,) = list(trainer.get_train_dataloader())[:1]
    prompts = [tuple(row["input_ids"]) for row in batch for _ in range(4)]
    return [(prompt, [3 + i % 5] * n) for i, (prompt, n) in enumerate(zip(prompts, LENGTHS, strict=True))]


def token_logprobs(model: Any, prompt: tuple[int, ...], response: list[int]) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])
    return [float(one) for one in chosen]


def logprob(model: Any, prompt: tuple[int, ...], response: list[int]) -> float:
    return sum(token_logprobs(model, prompt, response))


def test_what_the_policy_drew_last_is_what_it_is(in_process_workers: None, tmp_path: Path) -> None:
    """A step of no size leaves the policy as it was, on which the comparisons above rest."""
    trainer, _ = update(tmp_path, adam_epsilon=1e9)
    assert tiny.difference(trainer.model, tiny.policy()) < tiny.ROUNDING
