"""Whether what the user gave can be trained: arguments, models, tokenizer, dataset. One clear line for what cannot."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from itertools import combinations
from typing import Literal, cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from fuse.config.prompt_tokens import PromptTokens
from fuse.config.run import RunConfig
from fuse.engines.transformers import check_context
from fuse.intrastage.adapters import base_of, is_adapted
from fuse.roles import GENERATING, training
from fuse.trainers.reward_process import pickled
from fuse.trainers.rewards import RewardFunction
from fuse.training.advantage_model import is_advantage_model
from fuse.training.model_spec import ModelSpec
from fuse.training.model_support import check_trainable

_logger = logging.getLogger(__name__)


def check_arguments(
    model: object,
    ref_model: object,
    reward_model: object,
    train_dataset: object,
    value_model: object,
    optimizers: tuple[object, object],
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
    if not callable(reward_model):  # as models are, too
        raise ValueError(
            f"reward_model is {reward_model!r}: pass a sequence classifier with one label, or a function "
            f"(prompts, responses, **columns) -> list[float]"
        )
    for name, given in (("model", model), ("ref_model", ref_model), ("value_model", value_model)):
        if not isinstance(base_of(given), PreTrainedModel) and not (name == "ref_model" and given is None):
            raise ValueError(f"{name} is {given!r}: pass a transformers model, e.g. by from_pretrained")
    check_whole("ref_model", ref_model)
    check_unset({}, optimizers)


def check_unset(arguments: Mapping[str, object], optimizers: tuple[object, object]) -> None:
    """Raises: ValueError for arguments of TRL's trainers that are not supported."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name} is not supported: leave it out")
    if any(item is not None for item in optimizers):
        raise ValueError("optimizers must be (None, None): AdamW runs sharded in the workers; set its options in args")


def check_whole(argument: str, model: object) -> None:
    """Raises: ValueError for a reference with adapters."""
    if is_adapted(model):
        raise ValueError(f"{argument} has adapters and does not train: pass what its merge_and_unload() gives")


def check_policy(model: object) -> None:
    """Raises: ValueError for anything but a model."""
    if not isinstance(base_of(model), PreTrainedModel):
        raise ValueError(f"model is {model!r}: pass a causal language model, or its path")


def check_no_experts(config: PretrainedConfig, router_aux_loss_coef: float) -> None:
    """Raises: ValueError for a mixture of experts with a loss of its router, which stages do not compute."""
    if router_aux_loss_coef and getattr(config.get_text_config(), "output_router_logits", None) is not None:
        raise ValueError(
            f"router_aux_loss_coef={router_aux_loss_coef} with a mixture of experts, whose router's loss is not "
            f"supported: set it to 0.0"
        )


def check_reward_model(model: PreTrainedModel) -> None:
    """Raises: ValueError for a model that is no sequence classifier with one label or advantage model, or
    cannot be built again."""
    ModelSpec.of(model)
    _check_kind("reward", model)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ValueError for a missing padding token."""
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token, e.g. to tokenizer.eos_token")


def check_models(models: Mapping[str, PreTrainedModel], backend: Literal["transformers", "megatron"]) -> None:
    """Every token the policy can generate must exist in the models that read it. models: by role. backend: of stages.

    Dropout of models that are trained is only warned of: TRL's trainer disables it, too.

    Raises:
        ValueError: a vocabulary that is smaller than the policy's, or for the reference not of its size; a model of
            another kind than its role needs; models that share parameters; a model that workers cannot build again,
            or cannot train.
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
        _check_kind(role, model)
    for (role, model), (other_role, other_model) in combinations(models.items(), 2):
        if model is other_model and (role, other_role) == (GENERATING, "reference"):
            continue  # which is the actor without its adapters
        _check_shares_nothing(role, model, other_role, other_model)
    for role in training(models):
        check_trainable(models[role], backend)
        _warn_of_dropout(role, models[role])


_ARGUMENTS = {"actor": "model", "critic": "value_model", "reference": "ref_model", "reward": "reward_model"}
"""The trainer's, by role."""


def _check_kind(role: str, model: PreTrainedModel) -> None:
    """Raises: ValueError for anything but a language model where tokens count, a classifier of one label elsewhere, or
    for rewards an advantage model."""
    is_language_model = model.get_output_embeddings() is not None
    score = getattr(model, "score", None)
    kind = type(model).__name__
    if role in ("actor", "reference"):
        if not is_language_model:
            raise ValueError(f"{_ARGUMENTS[role]} is a {kind} without output embeddings: pass a causal language model")
        return
    if is_language_model or score is None:
        raise ValueError(
            f"{_ARGUMENTS[role]} is a {kind} without a `score` head: pass a sequence classifier with one label, e.g. "
            f"by AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)"
        )
    num_labels = getattr(score, "out_features", model.config.num_labels)
    if num_labels != 1 and not (role == "reward" and is_advantage_model(model.config)):
        raise ValueError(
            f"{_ARGUMENTS[role]} is a {kind} with {num_labels} labels, none of which is the score: pass one with one "
            f"label, e.g. by AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)"
        )


def _check_shares_nothing(role: str, model: PreTrainedModel, other_role: str, other: PreTrainedModel) -> None:
    """Raises: ValueError where training one model would change the other."""
    first = {parameter.data_ptr(): name for name, parameter in model.named_parameters() if parameter.numel()}
    for name, parameter in other.named_parameters():
        known = first.get(parameter.data_ptr()) if parameter.numel() and parameter.data_ptr() else None
        if known is not None:
            mine, its = _ARGUMENTS[role], _ARGUMENTS[other_role]
            raise ValueError(
                f"{mine} and {its} share parameters ({mine}.{known} is {its}.{name}), so training one would change the "
                f"other: pass a copy, copy.deepcopy({its})"
            )


_OTHER_HEADS = ("classifier", "summary")  # how dropout of heads that are not used here is named


def _warn_of_dropout(role: str, model: PreTrainedModel) -> None:
    for name, value in model.config.get_text_config().to_dict().items():
        is_rate = isinstance(value, (int, float)) and not isinstance(value, bool)
        if "drop" in name and is_rate and value > 0 and not name.startswith(_OTHER_HEADS):
            _logger.warning(
                "%s.config.%s=%s has no effect: models are trained without dropout, so that fusion changes no number; "
                "set it to 0.0",
                _ARGUMENTS[role],
                name,
                value,
            )


def check_reward_options(args: RunConfig, reward: object) -> None:
    """Raises: ValueError for options of reward functions where a model rewards, or a function no process can get."""
    if not isinstance(reward, PreTrainedModel):
        if args.reward_workers == "process":
            pickled(cast(RewardFunction, reward))
        return
    options = {field.name: field.default for field in fields(args) if field.name in _OF_REWARD_FUNCTIONS}
    for name, default in options.items():
        if (value := getattr(args, name)) != default:
            raise ValueError(f"{name}={value!r} is for reward functions, and a model gives the rewards: leave it out")


_OF_REWARD_FUNCTIONS = ("reward_workers", "reward_timeout_s", "reward_error_score")


def check_engine(args: RunConfig, model: PreTrainedModel, tokens: PromptTokens) -> None:
    """Raises: ValueError for a policy that the engine cannot decode, as far as its configuration tells."""
    if args.engine == "transformers":
        check_context(model, tokens.context(args.max_response_tokens, model.config))


def check_limits(max_new_tokens: Mapping[int, int], args: RunConfig) -> None:
    """Raises: ValueError for a limit of a sample's response that is none, or beyond what engines make room for."""
    for sample, limit in max_new_tokens.items():
        if not 1 <= limit <= args.max_response_tokens:
            raise ValueError(
                f"max_new_tokens of sample {sample} is {limit}: it must be from 1 to "
                f"{args.MAX_RESPONSE_OPTION}={args.max_response_tokens}"
            )


def check_evaluation(args: RunConfig, eval_dataset: object) -> None:
    """Raises: ValueError where evaluation is asked for and there is nothing to evaluate on."""
    if args.eval_strategy != IntervalStrategy.NO and eval_dataset is None:
        raise ValueError(
            f"eval_strategy={IntervalStrategy(args.eval_strategy).value!r} without eval_dataset: pass prompts whose "
            f"completions are to be shown, or set eval_strategy='no'"
        )
