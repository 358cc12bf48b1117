"""fuse's trainers without a critic arrive where TRL's do: every metric of every step, and every weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fuse import state_dict as state_dict_module
from fuse.algorithms import estimators, group_advantages, group_batch, grpo_loss, leave_one_out
from fuse.algorithms.sequences import Sequences
from fuse.driver.mixing import Mixing
from fuse.trainers import group
from fuse.workers import model_worker

from .group_cases import CASES, DAPO, ENTROPY, FOLLOWING, GSPO, REUSED, RLOO, GroupCase
from .group_oracle import GroupRecording, record
from .group_replay import mismatches, replay

Recorded = Callable[[GroupCase], GroupRecording]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return cache(lambda case: record(case, tmp_path_factory.mktemp(f"oracle-{case.name}")))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_device(case: GroupCase, recorded: Recorded, in_process_workers: None, tmp_path: Path) -> None:
    recording = recorded(case)
    assert mismatches(recording, replay(case, recording, tmp_path, num_devices=1)) == []


@pytest.mark.parametrize("case", [DAPO, REUSED["grpo"], GSPO, FOLLOWING, RLOO], ids=str)
@pytest.mark.parametrize("stages", [1, 2])
def test_two_devices(case: GroupCase, stages: int, recorded: Recorded, pooled_workers: None, tmp_path: Path) -> None:
    """As two replicas, or in a pipeline."""
    recording = recorded(case)
    outcome = replay(case, recording, tmp_path, num_devices=2, actor_stages=stages)
    assert mismatches(recording, outcome) == []


@pytest.mark.parametrize("case", [REUSED["grpo"], GSPO, RLOO], ids=str)
def test_recomputed_log_probabilities(
    case: GroupCase, recorded: Recorded, in_process_workers: None, tmp_path: Path
) -> None:
    """As the oracle does: whatever the engine tells, which is off here, enters no loss."""
    recording = recorded(case)
    off = [replace(one, logprobs=[[p - 0.3 for p in own] for own in one.logprobs]) for one in recording.rollouts]
    disturbed = replace(recording, rollouts=tuple(off))
    outcome = replay(case, disturbed, tmp_path / "trainer", num_devices=1, old_logprobs="trainer")
    assert mismatches(recording, outcome) == []
    assert outcome.metrics[0]["val/sampler_logprob_diff"] == pytest.approx(0.3, abs=1e-3)
    assert mismatches(recording, replay(case, disturbed, tmp_path / "engine", num_devices=1, old_logprobs="engine"))


# Parity is not vacuous: each plausible mistake makes the comparison fail.


def population_deviation(patch: pytest.MonkeyPatch) -> None:
    def deviation(values: Tensor, dim: int) -> Tensor:
        return values.std(dim=dim, keepdim=True, unbiased=False)

    patch.setattr(group_advantages, "deviation", deviation)


def advantages_over_the_batch(patch: pytest.MonkeyPatch) -> None:
    right = estimators.group_advantages

    def group_advantages(rewards: Tensor, weights: Tensor, *, num_generations: int, **options: Any) -> Any:
        return right(rewards, weights, num_generations=len(rewards), **options)

    patch.setattr(estimators, "group_advantages", group_advantages)


def tokens_counted_by_micro_batch(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(grpo_loss.__dict__, "_MEANS", {**grpo_loss._MEANS, "dapo": grpo_loss._of_tokens})


def ratios_of_the_trainers_own(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(group.GroupConfig, "is_on_policy", True)


def sequence_ratios_without_the_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequences, "mean", Sequences.sum)


def kl_without_its_ratio(patch: pytest.MonkeyPatch) -> None:
    right = grpo_loss.GRPOLossSettings

    def settings(**options: Any) -> Any:
        return right(**{**options, "weighs_kl": False})

    patch.setattr("fuse.trainers.policy_gradient.GRPOLossSettings", settings)


def baseline_with_the_sample_itself(patch: pytest.MonkeyPatch) -> None:
    def whole_mean(rewards: Tensor, *, num_generations: int, normalize: bool) -> tuple[Tensor, Tensor]:
        _, deviations = leave_one_out.leave_one_out(rewards, num_generations=num_generations, normalize=normalize)
        grouped = rewards.view(-1, num_generations)
        return (grouped - grouped.mean(dim=1, keepdim=True)).flatten(), deviations

    patch.setattr(estimators, "leave_one_out", whole_mean)


def samples_in_the_order_of_generation(patch: pytest.MonkeyPatch) -> None:
    right = group.rollout_steps

    def rollout_steps(permutations: Any, **options: Any) -> Any:
        return right([np.sort(permutation) for permutation in permutations], **options)

    patch.setattr(group, "rollout_steps", rollout_steps)


def end_tokens_not_trained_on(patch: pytest.MonkeyPatch) -> None:
    right = group_batch.counted_tokens

    def counted_tokens(responses: Any, lengths: Any) -> Tensor:
        tokens = right(responses, lengths)
        return torch.where(tokens == 5, 6, tokens)

    patch.setattr(group_batch, "counted_tokens", counted_tokens)


def entropy_without_a_gradient(patch: pytest.MonkeyPatch) -> None:
    right = grpo_loss.token_logprobs

    def token_logprobs(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        logprobs, entropy = right(*arguments, **options)
        return logprobs, entropy.detach()

    patch.setattr(grpo_loss, "token_logprobs", token_logprobs)


def reference_that_moves_between_updates_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mixing, "pieces", lambda mixing, num_before, num_steps: [slice(num_steps)])


def reference_that_forgets_itself(patch: pytest.MonkeyPatch) -> None:
    def mix(model: Any, tensors: Any, alpha: float) -> None:
        state_dict_module.mix_tensors(model, tensors, 1.0)

    patch.setattr(model_worker, "mix_tensors", mix)


@pytest.mark.parametrize(
    ("break_it", "case"),
    [
        (population_deviation, DAPO),
        (advantages_over_the_batch, DAPO),
        (tokens_counted_by_micro_batch, DAPO),
        (ratios_of_the_trainers_own, REUSED["dapo"]),
        (sequence_ratios_without_the_mean, GSPO),
        (kl_without_its_ratio, REUSED["dapo"]),
        (baseline_with_the_sample_itself, RLOO),
        (samples_in_the_order_of_generation, REUSED["dapo"]),
        (end_tokens_not_trained_on, DAPO),
        (entropy_without_a_gradient, ENTROPY),
        (reference_that_moves_between_updates_alone, FOLLOWING),
        (reference_that_forgets_itself, FOLLOWING),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_wrong_variant_is_caught(
    break_it: Callable[[pytest.MonkeyPatch], None],
    case: GroupCase,
    recorded: Recorded,
    in_process_workers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recording = recorded(case)
    break_it(monkeypatch)
    assert mismatches(recording, replay(case, recording, tmp_path, num_devices=1)), "the comparison did not notice"
