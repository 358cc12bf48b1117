"""The oracle: TRL's GRPOTrainer or RLOOTrainer runs a case, and what it consumed and produced is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from trl import import_utils

with mock.patch.object(import_utils, "is_vllm_available", return_value=False):  # it would import any version
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.trainer import grpo_trainer, rloo_trainer

from .cases import draw_adapters
from .group_cases import EOS, GroupCase, build_dataset, build_policy, build_tokenizer, peft_config, reward_functions

_TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig, grpo_trainer), "rloo": (RLOOTrainer, RLOOConfig, rloo_trainer)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """prompts: rows of the dataset, one per sample. responses: token ids and log-probabilities. order: of training."""

    prompts: tuple[dict[str, Any], ...]
    responses: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    order: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecording:
    """One run: what a replay needs, and what it must arrive at. metrics: as logged, one per optimizer step."""

    rollouts: tuple[Rollout, ...]
    metrics: tuple[dict[str, float], ...]
    policy: dict[str, Tensor]


def record(case: GroupCase, output_dir: Path) -> GroupRecording:
    """Train `case` with TRL on one process."""
    GradientState._reset_state()  # accelerate's process-wide state must not leak from case to case
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer_class, config_class, module = _TRAINERS[case.algorithm]
    policy = build_policy(case)
    with mock.patch.object(module, "create_model_from_path", return_value=build_policy(case)):
        trainer = trainer_class(
            model=policy,
            reward_funcs=reward_functions(case),
            args=config_class(output_dir=str(output_dir), **case.training_options),
            train_dataset=build_dataset(),
            processing_class=build_tokenizer(),
            peft_config=peft_config(case),
        )
    draw_adapters(policy)
    with _recorded(trainer, module) as rollouts:
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return GroupRecording(
        rollouts=tuple(rollouts),
        metrics=tuple(logs),
        policy={name: weight.detach().clone() for name, weight in policy.state_dict().items()},
    )


@contextmanager
def _recorded(trainer: Any, module: Any) -> Iterator[list[Rollout]]:
    rollouts: list[Rollout] = []
    unordered: list[dict[str, Any]] = []
    generate, shuffle = trainer._generate_and_score_completions, module.shuffle_sequence_dict
    single_turn = trainer._generate_single_turn

    def generate_single_turn(prompt_ids: list[list[int]], *args: Any) -> Any:
        """Seeded by the rollout's number; what the sampler would have said of its tokens is computed at once."""
        torch.manual_seed(100 + len(rollouts))
        made = single_turn(prompt_ids, *args)
        completions = made[0] if isinstance(made, tuple) else made
        unordered[-1]["responses"] = tuple(map(tuple, completions))
        unordered[-1]["logprobs"] = _logprobs(trainer.model, trainer.temperature, prompt_ids, completions)
        return made

    def generate_and_score(inputs: list[dict[str, Any]]) -> Any:
        unordered.append({"prompts": tuple(dict(row) for row in inputs)})
        output = generate(inputs)
        output["place"] = torch.arange(len(inputs))
        return output

    def shuffle_sequence_dict(batch: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(200 + len(rollouts))
        shuffled = shuffle(batch)
        rollouts.append(Rollout(order=tuple(shuffled.pop("place").tolist()), **unordered[-1]))
        return shuffled

    trainer._generate_single_turn = generate_single_turn
    trainer._generate_and_score_completions = generate_and_score
    with mock.patch.object(module, "shuffle_sequence_dict", shuffle_sequence_dict):
        yield rollouts


def _logprobs(model: Any, temperature: float, prompts: Any, completions: Any) -> tuple[tuple[float, ...], ...]:
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(tokens).logits[0, len(prompt) - 1 : -1] / temperature
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])
        found.append(tuple(chosen.squeeze(-1).tolist()))
    assert any(completion[-1] != EOS for completion in completions), "some responses reach their greatest length"
    return tuple(found)
