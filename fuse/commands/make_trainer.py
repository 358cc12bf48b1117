"""The trainer that the options of `fuse train` ask for."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from fuse.commands.algorithms import trainer_class
from fuse.commands.models import critic_from_policy, load_classifier, load_policy, load_tokenizer
from fuse.commands.train_inputs import Inputs, prompt_column
from fuse.engines.limits import num_positions
from fuse.intrastage.adapters import Adapters
from fuse.trainers.data import MESSAGES, prompt_rows
from fuse.trainers.group import PROMPT
from fuse.trainers.ppo import PPOTrainer
from fuse.trainers.prompt_checks import too_long_remedy
from fuse.trainers.reward_columns import takes_column
from fuse.trainers.trainer import Trainer
from fuse.training.advantage_model import is_advantage_model
from fuse.workers.cluster import Cluster


def make_trainer(
    arguments: argparse.Namespace, inputs: Inputs, tell: Callable[[str], None], cluster: Cluster | None
) -> Trainer:
    """Everything the options name, loaded and checked; `tell` hears what is being loaded.

    Raises:
        ValueError: models or data that cannot be trained.
    """
    disable_progress_bar()  # of loading and saving
    tell("loading: the tokenizer")
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, arguments.pad_token)
    tell(f"loading: the policy at {arguments.model}")
    policy = load_policy(arguments.model)
    tell("loading: prompts and the other models")
    making = _ppo if arguments.algorithm == "ppo" else _without_critic
    trainer = making(arguments, inputs, tokenizer, policy)
    trainer.cluster = cluster
    return trainer


def _without_critic(
    arguments: argparse.Namespace, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel
) -> Trainer:
    column = prompt_column(arguments)

    def renamed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{PROMPT if name == column else name: value for name, value in row.items()} for row in rows]

    models = [load_classifier(arguments.reward_model)] if arguments.reward_model else []
    made: Trainer = trainer_class(arguments.algorithm)(
        model=policy,
        reward_funcs=[*inputs.rewards, *models],
        args=inputs.config,
        train_dataset=renamed(inputs.rows),
        eval_dataset=None if inputs.eval_rows is None else renamed(inputs.eval_rows),
        processing_class=tokenizer,
        peft_config=inputs.lora,
    )
    return made


def _ppo(
    arguments: argparse.Namespace, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel
) -> Trainer:
    config = inputs.config
    reward: Any = inputs.rewards[0] if inputs.rewards else None
    context = num_positions(policy.config)

    def tokenised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return prompt_rows(
            rows,
            tokenizer,
            prompt_column=arguments.prompt_column,
            response_length=config.response_length,
            context=context if config.long_prompts == "error" else None,
            too_long=too_long_remedy(config.MAX_RESPONSE_OPTION),
            with_messages=reward is not None and takes_column(reward, MESSAGES),
        )

    train_dataset = tokenised(inputs.rows)
    eval_dataset = None if inputs.eval_rows is None else tokenised(inputs.eval_rows)
    if arguments.reward_model:
        reward = load_classifier(arguments.reward_model)
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=_reference(arguments, inputs, policy),
        reward_model=reward,
        train_dataset=train_dataset,
        value_model=_critic(arguments.value_model, reward, policy, tokenizer.pad_token_id),
        eval_dataset=eval_dataset,
        peft_config=inputs.lora,
        value_peft_config=inputs.lora,
    )


def _reference(arguments: argparse.Namespace, inputs: Inputs, policy: PreTrainedModel) -> PreTrainedModel | None:
    """That asked for, or the policy's file once more, whose pages are the system's; the trainer's copy would be ours.

    None where it is the policy without or by other adapters.
    """
    if arguments.ref_model:
        return load_policy(arguments.ref_model)
    if inputs.lora is not None or Adapters.of(policy) or inputs.config.ref_adapter_name is not None:
        return None
    return load_policy(arguments.model)


def _critic(path: str | None, reward: object, policy: PreTrainedModel, pad_token_id: int) -> PreTrainedModel:
    """That at `path`, or one on the reward model's layers, with its head where that is one of values."""
    if path is not None:
        return load_classifier(path)
    if isinstance(reward, PreTrainedModel) and not is_advantage_model(reward.config):
        return copy.deepcopy(reward)
    return critic_from_policy(reward if isinstance(reward, PreTrainedModel) else policy, pad_token_id)
