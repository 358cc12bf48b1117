"""TRL's GRPOTrainer in `fuse bench iteration --algorithm grpo`: as `trl` has its PPOTrainer, in a process of its own.

It generates a rollout with one `model.generate`, as it always does; every step computes logits and draws from them,
then the token that this project's trainer generated takes the place of the one drawn. All that follows is left alone,
on micro-batches of the same samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback

from fuse.benchmarks.iteration.trl import State, ended, forced_draws, rebuilt
from fuse.benchmarks.iteration.workload import Workload, even_tokens
from fuse.state_dict import load_state_dict


def train(connection: Connection, workload: Workload, directory: str) -> None:
    """Iterate, a turn at a time, until the other side is gone."""
    with mock.patch.object(import_module("trl.import_utils"), "is_vllm_available", return_value=False):
        grpo_trainer: Any = import_module("trl.trainer.grpo_trainer")  # it would import any version of vLLM
        config_class: Any = import_module("trl.trainer.grpo_config").GRPOConfig
    policy = rebuilt(workload.models.policy, load_state_dict)
    reference = rebuilt(workload.models.policy, load_state_dict)
    rows = workload.dataset()
    with mock.patch.object(grpo_trainer, "create_model_from_path", return_value=reference):
        trainer: Any = grpo_trainer.GRPOTrainer(
            model=policy,
            reward_funcs=[even_tokens],
            args=config_class(output_dir=directory, logging_steps=1, **workload.options()),
            train_dataset=Dataset.from_list(rows),
            processing_class=workload.models.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    turns = _Turns(connection, workload, trainer)
    trainer.get_train_dataloader = lambda: turns
    trainer._generate_single_turn = turns.generate_single_turn
    trainer._tokenize_prompts = lambda prompts: ([list(one.prompt_ids) for one in turns.state.same], None, {})
    with mock.patch.object(grpo_trainer, "shuffle_sequence_dict", turns.shuffle):
        trainer.train()


class _Turns:
    """The trainer's batches, each at its turn, and what is done otherwise in them."""

    def __init__(self, connection: Connection, workload: Workload, trainer: Any) -> None:
        self._connection, self._workload, self._trainer = connection, workload, trainer
        self._generate = trainer._generate_single_turn
        self.state: State

    def __iter__(self) -> Iterator[Any]:
        workload, args = self._workload, self._trainer.args
        self._connection.send(None)
        for round_index in range(workload.num_rounds):
            same = self._connection.recv()
            self.state = State(update=round_index + 1, same=same, start_s=time.perf_counter())
            rows = [row for row in workload.rows(round_index) for _ in range(workload.num_generations)]
            for _ in range(args.steps_per_generation * args.num_iterations):
                yield rows
            self._connection.send(ended(self._trainer, self.state))  # once the next batch is asked for
        self._connection.recv()  # nothing more comes: the other side ends

    def generate_single_turn(self, prompt_ids: Any, *others: Any) -> tuple[list[list[int]], None]:
        start_s, same, trainer = time.perf_counter(), self.state.same, self._trainer
        trainer.generation_config.max_new_tokens = max(len(one.response_ids) for one in same)
        if self._workload.lengths is not None:
            trainer.generation_config.eos_token_id = None
        with forced_draws(same, trainer.processing_class.pad_token_id):
            self._generate(prompt_ids, *others)
        self.state.generation_s = time.perf_counter() - start_s
        self.state.generated = list(same)
        return [list(one.response_ids) for one in same], None

    def shuffle(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Into the order that this project's trainer takes samples in; then training begins."""
        seed = self._workload.options()["seed"]
        order = torch.from_numpy(np.random.default_rng([seed, self.state.update, 0]).permutation(self._workload.batch))
        self.state.training_start_s = time.perf_counter()
        return {name: value[order] if torch.is_tensor(value) and value.ndim else value for name, value in batch.items()}
