"""Online DPO arrives where TRL's trainer does: losses, rewards of pairs, gradients, and every weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from trl import import_utils

from fuse import OnlineDPOConfig, OnlineDPOTrainer
from fuse.algorithms import online_dpo
from fuse.engines.replay import ReplayEngine
from fuse.trainers import group

from .group_cases import OPTIONS, PAD, GroupCase, build_dataset, build_policy, build_tokenizer, count_wanted
from .group_replay import RecordedRows

with mock.patch.object(import_utils, "is_vllm_available", return_value=False):  # it would import any version
    from trl.experimental import online_dpo as oracle

PROMPTS = 4
"""Of a micro-batch."""
POLICY = GroupCase(name="policy")
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "objective/scores_margin")


def untied(completions: list[str], completion_ids: list[list[int]], wanted: list[str], **kwargs: Any) -> list[float]:
    """Tokens and their order count, too: TRL and we differ where responses are rewarded alike."""
    shares = count_wanted(completions, wanted)
    own = [[token for token in ids if token != PAD] for ids in completion_ids]  # TRL gives padding, too
    return [
        share + sum(0.01 * token / (place + 2) for place, token in enumerate(ids))
        for share, ids in zip(shares, own, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    def options_of(self, batch_size: int) -> dict[str, Any]:
        own = {name: value for name, value in OPTIONS.items() if name not in _OF_GROUPS}
        own |= {"max_new_tokens": 10, "temperature": 1.0, "loss_type": self.loss_type, "beta": 0.5}
        return {**own, "per_device_train_batch_size": batch_size, **self.options}


_OF_GROUPS = ("num_generations", "max_completion_length", "epsilon")
SIGMOID, IPO = Case("sigmoid"), Case("ipo", "ipo")
ENDING = Case("missing-eos", options={"missing_eos_penalty": 0.7})


@dataclass(frozen=True, slots=True)
class Recording:
    """calls: prompts of each micro-batch, and their responses, those to one prompt side by side."""

    calls: tuple[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]], ...]
    metrics: tuple[Mapping[str, float], ...]
    policy: Mapping[str, Tensor]


def record(case: Case, output_dir: Path) -> Recording:
    """Train with TRL on one process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    policy = build_policy(POLICY)
    trainer = oracle.OnlineDPOTrainer(
        model=policy,
        ref_model=build_policy(POLICY),
        reward_funcs=untied,
        args=oracle.OnlineDPOConfig(output_dir=str(output_dir), **case.options_of(PROMPTS)),
        train_dataset=build_dataset(),
        processing_class=build_tokenizer(),
    )
    calls = []
    generate = trainer._generate

    def recorded(model: Any, prompts: list[str], images: Any = None) -> Any:
        torch.manual_seed(100 + len(calls))
        made = generate(model, prompts, images)
        _, _, tokens, mask = made
        responses = [tuple(row[kept.bool()].tolist()) for row, kept in zip(tokens, mask, strict=True)]
        halves = zip(responses[: len(prompts)], responses[len(prompts) :], strict=True)
        calls.append((tuple(prompts), tuple(response for pair in halves for response in pair)))
        return made

    trainer._generate = recorded
    trainer.train()
    return Recording(
        calls=tuple(calls),
        metrics=tuple(entry for entry in trainer.state.log_history if "loss" in entry),
        policy={name: weight.detach().clone() for name, weight in policy.state_dict().items()},
    )


def mismatches(case: Case, recording: Recording, output_dir: Path, **options: Any) -> list[str]:
    """What differs after training with fuse on the recorded responses, in words."""
    policy = build_policy(POLICY)
    config = OnlineDPOConfig(output_dir=str(output_dir), **case.options_of(2 * PROMPTS), **options)
    trainer = OnlineDPOTrainer(
        model=policy,
        reward_funcs=untied,
        args=config,
        train_dataset=build_dataset(),
        processing_class=build_tokenizer(),
    )
    rows = {row["prompt"]: row for row in trainer.train_dataset}
    per_update = config.gradient_accumulation_steps
    calls = [recording.calls[first : first + per_update] for first in range(0, len(recording.calls), per_update)]
    updates = [[rows[prompt] for prompts, _ in update for prompt in prompts] for update in calls]
    samples = [(ids, (0.0,) * len(ids)) for _, responses in recording.calls for ids in responses]
    recordings = dict(enumerate(samples))
    # A lambda, for workers do not know this module: it travels to them by value.
    trainer._settings = replace(trainer._settings, engine=lambda *_: ReplayEngine(recordings))
    trainer.get_train_dataloader = lambda: RecordedRows(updates)
    trainer.train()
    found = []
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for ours, theirs in zip(logs, recording.metrics, strict=True):
        # TRL adds up the gradients of micro-batches, where we and its other trainers take their mean.
        if ours["grad_norm"] * per_update != pytest.approx(theirs["grad_norm"], rel=1e-3):
            found.append(
                f"step {ours['step']}: grad_norm is {ours['grad_norm']}, the oracle's is {theirs['grad_norm']}"
            )
        for name in METRICS:
            if ours[name] != pytest.approx(theirs[name], rel=1e-3, abs=1e-4):  # TRL rounds losses to 4 digits
                found.append(f"step {ours['step']}: {name} is {ours[name]}, the oracle's is {theirs[name]}")
    for name, weight in recording.policy.items():
        if not (weight - policy.state_dict()[name]).abs().max().item() <= 1e-5:
            found.append(f"{name} differs")
    return found


Recorded = Callable[[Case], Recording]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return cache(lambda case: record(case, tmp_path_factory.mktemp(f"oracle-{case.name}")))


@pytest.mark.parametrize("case", [SIGMOID, IPO, ENDING], ids=str)
def test_one_device(case: Case, recorded: Recorded, in_process_workers: None, tmp_path: Path) -> None:
    recording = recorded(case)
    assert mismatches(case, recording, tmp_path, num_devices=1) == []
    moved = [
        (recording.policy[name] - weight).abs().max() for name, weight in build_policy(POLICY).state_dict().items()
    ]
    assert max(moved) > 1e-4


def test_two_devices(recorded: Recorded, pooled_workers: None, tmp_path: Path) -> None:
    assert mismatches(SIGMOID, recorded(SIGMOID), tmp_path, num_devices=2) == []


def pairs_cut(patch: pytest.MonkeyPatch) -> None:
    right = group.side_by_side

    def shifted(order: Any, size: int) -> Any:
        return np.roll(right(order, size), 1)

    patch.setattr(group, "side_by_side", shifted)


def worst_chosen(patch: pytest.MonkeyPatch) -> None:
    right = online_dpo.best_and_worst
    patch.setattr(online_dpo, "best_and_worst", lambda scores, count: right(-scores, count))


def no_reference(patch: pytest.MonkeyPatch) -> None:
    right = online_dpo.token_logprobs_of

    def without(samples: Any, lengths: Any) -> Any:
        sampler, reference = right(samples, lengths)
        return sampler, [np.zeros_like(one) for one in reference]

    patch.setattr(online_dpo, "token_logprobs_of", without)


@pytest.mark.parametrize("break_it", [pairs_cut, worst_chosen, no_reference], ids=lambda one: one.__name__)
def test_a_wrong_variant_is_caught(
    break_it: Callable[[pytest.MonkeyPatch], None],
    recorded: Recorded,
    in_process_workers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recording = recorded(SIGMOID)
    break_it(monkeypatch)
    assert mismatches(SIGMOID, recording, tmp_path, num_devices=1), "the comparison did not notice"
