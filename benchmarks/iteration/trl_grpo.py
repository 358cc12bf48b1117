"""TRL's GRPOTrainer, a turn at a time: it generates a rollout with one `model.generate`. See `trl`."""

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

from fuse.benchmarks.iteration.trl import Turns, forced_draws, trainable
from fuse.benchmarks.iteration.workload import Workload, even_tokens


def train(connection: Connection, workload: Workload, directory: str) -> None:
    """Iterate, a turn at a time, until the other side is gone."""
    with mock.patch.object(import_module("trl.import_utils"), "is_vllm_available", return_value=False):
        grpo_trainer: Any = import_module("trl.trainer.grpo_trainer")  # it would import any version of vLLM
        config_class: Any = import_module("trl.trainer.grpo_config").GRPOConfig
    reference = trainable(workload.models.policy)
    with mock.patch.object(grpo_trainer, "create_model_from_path", return_value=reference):
        trainer: Any = grpo_trainer.GRPOTrainer(
            model=trainable(workload.models.policy),
            reward_funcs=[even_tokens],
            args=config_class(output_dir=directory, logging_steps=1, **workload.options()),
            train_dataset=Dataset.from_list(workload.dataset()),
            processing_class=workload.models.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    args, generate = trainer.args, trainer._generate_single_turn

    def batches(round_index: int) -> Iterator[Any]:
        rows = [row for row in workload.rows(round_index) for _ in range(workload.num_generations)]
        return iter([rows] * (args.steps_per_generation * args.num_iterations))

    turns = Turns(connection, workload, trainer, batches)

    def generate_single_turn(prompt_ids: Any, *others: Any) -> tuple[list[list[int]], None]:
        start_s, same = time.perf_counter(), turns.state.same
        trainer.generation_config.max_new_tokens = max(len(one.response_ids) for one in same)
        if workload.lengths is not None:
            trainer.generation_config.eos_token_id = None
        with forced_draws(same, trainer.processing_class.pad_token_id):
            generate(prompt_ids, *others)
        turns.state.generation_s = time.perf_counter() - start_s
        turns.state.generated = list(same)
        return [list(one.response_ids) for one in same], None

    def shuffle(batch: dict[str, Any]) -> dict[str, Any]:
        """Into the order that this project's trainer takes samples in; then training begins."""
        seeds = [workload.options()["seed"], turns.state.update, 0]
        order = torch.from_numpy(np.random.default_rng(seeds).permutation(workload.batch))
        turns.state.training_start_s = time.perf_counter()
        return {name: value[order] if torch.is_tensor(value) and value.ndim else value for name, value in batch.items()}

    trainer.get_train_dataloader = lambda: turns
    trainer._generate_single_turn = generate_single_turn
    trainer._tokenize_prompts = lambda prompts: ([list(one.prompt_ids) for one in turns.state.same], None, {})
    with mock.patch.object(grpo_trainer, "shuffle_sequence_dict", shuffle):
        trainer.train()
