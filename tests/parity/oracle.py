"""The oracle: TRL's PPOTrainer runs a case, and everything it consumed and produced is recorded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from numpy.typing import NDArray
from torch import Tensor

from fuse.intrastage.adapters import base_of

from .cases import Case, build_dataset, build_models, build_tokenizer, draw_adapters, peft_config

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # reads the variable when imported


@dataclass(frozen=True, slots=True)
class Response:
    """What was sampled for one prompt, without the padding that fills up the batch; the stop token is part of it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One run: what a replay needs, and what it must arrive at.

    queries: left-padded prompts of every update, int64 [batch, context].
    responses: of every sample, in the order of the queries' rows over the whole run.
    permutations: as drawn, one per update and epoch.
    metrics: as logged, one per update.
    policy, value: final weights.
    """

    queries: tuple[Tensor, ...]
    responses: tuple[Response, ...]
    permutations: tuple[NDArray[np.int64], ...]
    metrics: tuple[dict[str, float], ...]
    policy: dict[str, Tensor]
    value: dict[str, Tensor]


def record(case: Case, output_dir: Path) -> Recording:
    """Train `case` with TRL on one process."""
    GradientState._reset_state()  # accelerate's process-wide state must not leak from case to case
    AcceleratorState._reset_state(reset_partial_state=True)
    models = build_models(case)
    trainer = PPOTrainer(
        args=PPOConfig(output_dir=str(output_dir), bf16=False, **case.training_options),
        processing_class=build_tokenizer(case),
        model=models.policy,
        ref_model=models.reference,
        reward_model=models.reward,
        train_dataset=build_dataset(case),
        value_model=models.value,
        peft_config=peft_config(case),
    )
    draw_adapters(trainer.policy_model)
    with _recorded_rollouts(trainer, case) as (queries, responses), _recorded_permutations() as permutations:
        trainer.train()
    return Recording(
        queries=tuple(queries),
        responses=tuple(responses),
        permutations=tuple(permutations),
        metrics=tuple(trainer.state.log_history),
        policy=_weights(base_of(trainer.policy_model)),
        value=_weights(models.value),
    )


@contextmanager
def _recorded_rollouts(trainer: PPOTrainer, case: Case) -> Iterator[tuple[list[Tensor], list[Response]]]:
    queries: list[Tensor] = []
    responses: list[Response] = []
    generate = ppo_trainer.batch_generation

    def batch_generation(model: Any, query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        stop = model.generation_config.eos_token_id
        model.generation_config.eos_token_id = None if case.past_stop else stop
        torch.manual_seed(len(queries))
        query_responses, logits = generate(model, query, *args)
        model.generation_config.eos_token_id = stop
        queries.append(query.clone())
        tokens = query_responses[:, query.shape[1] :]
        logprobs = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        for row_tokens, row_logprobs in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            length = len(row_tokens)
            if stop in row_tokens and not case.past_stop:
                length = row_tokens.index(stop) + 1
            responses.append(Response(tuple(row_tokens[:length]), tuple(row_logprobs[:length])))
        return query_responses, logits

    with mock.patch.object(ppo_trainer, "batch_generation", batch_generation):
        yield queries, responses


@contextmanager
def _recorded_permutations() -> Iterator[list[NDArray[np.int64]]]:
    drawn: list[NDArray[np.int64]] = []
    random = np.random.default_rng(3)

    def permutation(length: int) -> NDArray[np.int64]:
        drawn.append(random.permutation(length))
        return drawn[-1]

    with mock.patch.object(ppo_trainer, "np", SimpleNamespace(random=SimpleNamespace(permutation=permutation))):
        yield drawn


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}
