"""Models from paths, and a critic from what there is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from fuse.commands.model_path import check_model_path
from fuse.training.advantage_model import is_advantage_model


def load_tokenizer(path: str, pad_token: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, with `pad_token` where one is given.

    Raises:
        ValueError: there is none, it has no padding token, or `pad_token` is not in its vocabulary.
    """
    tokenizer = _tokenizer(path)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(f"--pad-token {pad_token!r} is not in the tokenizer's vocabulary: name one that is")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        hint = f", e.g. --pad-token {tokenizer.eos_token!r}" if tokenizer.eos_token else ""
        raise ValueError(f"the tokenizer at {path} has no pad token: name one of its tokens with --pad-token{hint}")
    return tokenizer


def load_reading_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, where nothing is trained: without a padding token, its end of sequence does for one.

    Raises:
        ValueError: there is none, or it has neither.
    """
    tokenizer = _tokenizer(path)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer at {path} has neither a pad token nor an end of sequence: give it one")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    check_model_path(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {path}: {_first_sentence(error)}") from error
    return tokenizer


def load_policy(path: str) -> PreTrainedModel:
    """The causal language model at `path`, in the type it is saved in, which it will be saved in again.

    Raises:
        ValueError: there is none.
    """
    check_model_path(path)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    except OSError as error:
        raise ValueError(f"no model at {path}: {_first_sentence(error)}") from error
    return model


def load_classifier(path: str) -> PreTrainedModel:
    """The sequence classifier with one label, or the advantage model, at `path`, in the type it is saved in.

    Raises:
        ValueError: there is none, or the model there is of another kind.
    """
    check_model_path(path)
    try:
        config = AutoConfig.from_pretrained(path)
        architecture = (config.architectures or ["unknown"])[0]
        scores = config.num_labels == 1 or is_advantage_model(config)
        if not architecture.endswith("ForSequenceClassification") or not scores:
            raise ValueError(
                f"the model at {path} is a {architecture} with {config.num_labels} labels: "
                "a reward or value model must be a sequence classifier with one label"
            )
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(path, dtype="auto")
    except OSError as error:
        raise ValueError(f"no model at {path}: {_first_sentence(error)}") from error
    return model


def critic_from_policy(policy: PreTrainedModel, pad_token_id: int) -> PreTrainedModel:
    """A sequence classifier on a copy of the policy's layers, whose zero head values every state at 0 before training.

    An advantage model does for a policy: what it expects of every state is about 0.

    Raises:
        ValueError: transformers has no sequence classifier for this architecture.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    config.pad_token_id = pad_token_id
    try:
        with no_init_weights():  # drawing what is copied or zero takes longer than all else
            critic: Any = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise ValueError(
            f"transformers has no sequence classifier of type {config.model_type}: give one with --value-model"
        ) from error
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    for parameter in critic.score.parameters():
        torch.nn.init.zeros_(parameter)
    made: PreTrainedModel = critic
    return made


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]
