"""Whether what the user gave can be trained: arguments, models, tokenizer, dataset. One clear line for what cannot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fuse.config.ppo import PPOConfig
from fuse.roles import GENERATING
from fuse.training.model_spec import ModelSpec


def check_arguments(
    model: object,
    ref_model: object,
    reward_model: object,
    train_dataset: object,
    value_model: object,
    optimizers: tuple[object, object],
    peft_config: object,
) -> None:
    """Raises: ValueError for a combination of the trainer's arguments that cannot be trained."""
    if train_dataset is None:
        raise ValueError("train_dataset is None: PPO needs prompts to train on")
    if ref_model is model:
        raise ValueError(
            "model and ref_model are the same object: pass a copy as ref_model, or None for one to be made"
        )
    if value_model is None:
        raise ValueError("value_model is None: pass a sequence classifier with one label, e.g. a copy of reward_model")
    if not isinstance(reward_model, PreTrainedModel) and not callable(reward_model):
        raise ValueError(
            f"reward_model is {reward_model!r}: pass a sequence classifier with one label, or a function "
            f"(prompts, responses, **columns) -> list[float]"
        )
    if any(item is not None for item in optimizers):
        raise ValueError("optimizers must be (None, None): AdamW runs sharded in the workers; set its options in args")
    if peft_config is not None:
        raise ValueError("peft_config is not supported: merge the adapter into the model, or train all weights")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, *, needs_eos: bool) -> None:
    """Raises: ValueError for a missing padding token, or end-of-sequence token where one is needed."""
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token, e.g. to tokenizer.eos_token")
    if needs_eos and tokenizer.eos_token_id is None:
        raise ValueError("stop_token='eos' but the tokenizer has no end-of-sequence token: set stop_token_id instead")


def check_models(models: Mapping[str, PreTrainedModel]) -> None:
    """Every token the policy can generate must exist in the models that read it. models: by role.

    Raises:
        ValueError: a vocabulary that is smaller than the policy's, or for the reference not of its size; a model that
            workers cannot build again.
    """
    size = models[GENERATING].config.get_text_config().vocab_size
    for role, model in models.items():
        other = model.config.get_text_config().vocab_size
        if other < size or (role == "reference" and other != size):
            raise ValueError(
                f"vocabulary mismatch: the policy has {size} tokens, {_ARGUMENTS[role]} has {other}: "
                f"use models of one tokenizer, or resize_token_embeddings"
            )
        ModelSpec.of(model)


_ARGUMENTS = {"actor": "model", "critic": "value_model", "reference": "ref_model", "reward": "reward_model"}
"""The trainer's, by role."""


def check_prompts(
    rows: Iterable[Mapping[str, Any]], policy: PreTrainedModel, response_length: int, pad_token_id: int
) -> None:
    """Raises: ValueError naming the first row whose prompt is empty, too long or outside the vocabulary."""
    config = policy.config.get_text_config()
    context, vocabulary_size = getattr(config, "max_position_embeddings", None), config.vocab_size
    for index, row in enumerate(rows):
        if "input_ids" not in row:
            names = ", ".join(row) or "none"
            raise ValueError(f"dataset row {index} has no column 'input_ids' (it has: {names}): tokenise the prompts")
        length = len(row["input_ids"])
        if all(token == pad_token_id for token in row["input_ids"]):
            raise ValueError(f"dataset row {index} has an empty prompt: remove it")
        if context is not None and length + response_length > context:
            raise ValueError(
                f"dataset row {index} has {length} prompt tokens, which with response_length={response_length} exceed "
                f"the model's context of {context}: shorten or remove it, or lower response_length"
            )
        highest = max(map(int, row["input_ids"]))
        if highest >= vocabulary_size:
            raise ValueError(
                f"dataset row {index} holds token {highest}, the models have {vocabulary_size}: "
                f"tokenise with the models' own tokenizer"
            )


def fill_batch_sizes(args: PPOConfig, num_rows: int) -> None:
    """Derive what TRL derives, for one process: the batch does not depend on the number of devices."""
    if args.total_episodes is None:
        args.total_episodes = int(args.num_train_epochs * num_rows)
    args.world_size = 1
    args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    args.micro_batch_size = args.per_device_train_batch_size
    args.batch_size = args.local_batch_size
    if args.batch_size % args.num_mini_batches:
        raise ValueError(
            f"num_mini_batches={args.num_mini_batches} does not divide the batch of {args.batch_size} "
            f"(per_device_train_batch_size x gradient_accumulation_steps): choose a divisor"
        )
    args.mini_batch_size = args.local_mini_batch_size = args.batch_size // args.num_mini_batches
    if args.whiten_rewards and args.local_mini_batch_size < 8:
        raise ValueError(
            f"whiten_rewards needs mini-batches of at least 8 samples, these have {args.local_mini_batch_size}: "
            f"raise per_device_train_batch_size or gradient_accumulation_steps, or lower num_mini_batches"
        )
    args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)
