"""TRL's PPOTrainer, a turn at a time: it generates batches of `local_rollout_forward_batch_size`. See `trl`."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback

from fuse.benchmarks.iteration.trl import Turns, forced_draws, shared, trainable
from fuse.benchmarks.iteration.turn import Response
from fuse.benchmarks.iteration.workload import Workload


def train(connection: Connection, workload: Workload, directory: str) -> None:
    """Iterate, a turn at a time, until the other side is gone."""
    ppo: Any = import_module("trl.experimental.ppo")
    ppo_trainer: Any = import_module("trl.experimental.ppo.ppo_trainer")
    models = workload.models
    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(output_dir=directory, **workload.options()),
        processing_class=models.tokenizer,
        model=trainable(models.policy),
        ref_model=shared(models.reference),
        reward_model=shared(models.reward),
        train_dataset=workload.dataset(),
        value_model=trainable(models.critic),
    )
    trainer.remove_callback(PrinterCallback)

    def batches(round_index: int) -> Iterator[Any]:
        rows: Any = workload.rows(round_index)
        return iter(DataLoader(rows, batch_size=len(rows), collate_fn=trainer.data_collator))

    trainer.dataloader = turns = Turns(connection, workload, trainer, batches)
    generate, seed = ppo_trainer.generate, workload.options()["seed"]

    def forced(model: Any, queries: Tensor, pad_token_id: int, generation_config: Any) -> tuple[Tensor, Tensor]:
        start_s, state = time.perf_counter(), turns.state
        same = state.same[len(state.generated) : len(state.generated) + len(queries)]
        config = copy.copy(generation_config)
        config.max_new_tokens = max(len(one.response_ids) for one in same)
        with forced_draws(same, pad_token_id):
            sequences, logits = generate(model, queries, pad_token_id, config)
        state.generation_s += time.perf_counter() - start_s
        context = queries.shape[1]
        for one, row in zip(same, sequences.tolist(), strict=True):
            prompt = row[context - len(one.prompt_ids) : context]
            response = row[context : context + len(one.response_ids)]
            state.generated.append(Response(tuple(prompt), tuple(response)))
        return sequences, logits

    def permutation(length: int) -> Any:
        """The order in which this project's trainer takes samples; then training begins."""
        state = turns.state
        if not state.num_permutations:
            state.training_start_s = time.perf_counter()
        seeds = [seed, state.update, state.num_permutations]
        state.num_permutations += 1
        return np.random.default_rng(seeds).permutation(length)

    forced_numpy = SimpleNamespace(random=SimpleNamespace(permutation=permutation))
    with mock.patch.object(ppo_trainer, "generate", forced), mock.patch.object(ppo_trainer, "np", forced_numpy):
        trainer.train()
