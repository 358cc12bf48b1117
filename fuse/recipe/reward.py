"""A reward model from preferences, by TRL's RewardTrainer: a sequence classifier of one output, or an advantage model.

Beyond TRL's: preferences that contradict each other are dropped, lengths balanced, losses (`reward_loss.py`), and its
accuracy on held-out pairs by their difference of lengths.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from fuse.intrastage.adapters import lora
from fuse.recipe.accuracy import Accuracy, accuracy_of, save_calibration
from fuse.recipe.balance import balanced_by_length, length_buckets
from fuse.recipe.preferences import preferences_of, without_contradictions
from fuse.recipe.reward_loss import AdvantageTrainer, SquareRegularisedTrainer
from fuse.recipe.tokens import TokenisedPreference, tokenised
from fuse.recipe.training import TrainingStep, parsed, read_tokenised, say, train
from fuse.trainers.data import read_rows
from fuse.training.reading import TokenSequence
from fuse.training.scoring import scores

CALIBRATION = "calibration.png"


def train_reward_model(step: TrainingStep) -> dict[str, Any]:
    """Train, and save the model with a picture of its calibration; returns what was trained on, and held-out accuracy.

    Raises: ValueError where no pairs are left to train on.
    """
    config = parsed("reward", step)
    _check_base(step.model)
    tokenizer = AutoTokenizer.from_pretrained(step.model)
    consistent = without_contradictions(preferences_of(read_rows(step.data))[0])
    pairs = [tokenised(preference, tokenizer) for preference in consistent.kept]
    fitting = [one for one in pairs if config.max_length is None or _length(one) <= config.max_length]
    kept = fitting
    if config.length_buckets:
        indices = balanced_by_length([_difference(one) for one in fitting], config.length_buckets, step.seed)
        kept = [fitting[index] for index in indices]
    counts = {
        "num_pairs": len(kept),
        "num_tied": consistent.num_tied,
        "num_cyclic": consistent.num_cyclic,
        "num_too_long": len(pairs) - len(fitting),
        "num_left_out_for_balance": len(fitting) - len(kept),
    }
    say("reward: " + ", ".join(f"{name.removeprefix('num_').replace('_', ' ')} {n}" for name, n in counts.items()))
    if not kept:
        raise ValueError("no pair is left to train on: give more, or set --reward.length_buckets 0")
    log_history = _train(step, config, tokenizer, kept)
    held_out = read_tokenised(step.held_out, tokenizer)
    accuracy = None
    if held_out and PartialState().is_main_process:
        gc.collect()  # what trained, which goes in circles
        model = load(step.output_dir)[0].to(config.device)
        accuracy = held_out_accuracy(model, held_out, config.length_buckets)
        save_calibration(accuracy, Path(step.output_dir) / CALIBRATION)
    return {
        **counts,
        "held_out": accuracy and asdict(accuracy),
        "log_history": log_history,
    }


def _train(
    step: TrainingStep, config: Any, tokenizer: Any, pairs: Sequence[TokenisedPreference]
) -> list[dict[str, float]]:
    """Train and save; returns what was logged."""
    # Classifiers find their last token as that which is no padding, but scores are read at the end of sequence.
    padding = copy.deepcopy(tokenizer)
    padding.pad_token = padding.convert_ids_to_tokens(_no_last_token(pairs, tokenizer.pad_token_id, len(tokenizer)))
    kind = AdvantageTrainer if config.loss == "advantage" else SquareRegularisedTrainer
    trainer = kind(
        model=step.model,
        args=config,
        train_dataset=_dataset(pairs),
        processing_class=padding,
        peft_config=None if config.lora_r is None else _adapters(config),
    )
    train(trainer, "reward")
    model: Any = trainer.model
    if config.lora_r is not None:
        trainer.model = model = model.merge_and_unload()
    model.config.pad_token_id, trainer.processing_class = tokenizer.pad_token_id, tokenizer
    trainer.save_model(step.output_dir)
    history: list[dict[str, float]] = trainer.state.log_history
    return history


def _adapters(config: Any) -> Any:
    """On all linear layers; the head trains whole."""
    adapters: Any = lora(config.lora_r, config.lora_alpha or 2 * config.lora_r, None)
    adapters.task_type, adapters.modules_to_save = "SEQ_CLS", ["score"]
    return adapters


def _check_base(path: str) -> None:
    """Raises: ValueError for a classifier of which no output is a score."""
    config = AutoConfig.from_pretrained(path)
    kind = (config.architectures or ["unknown"])[0]
    if kind.endswith("ForSequenceClassification") and config.num_labels != 1:
        raise ValueError(
            f"the model at {path} is a {kind} with {config.num_labels} labels: give a language model, or a classifier "
            "with one label, as --reward-base"
        )


def _no_last_token(pairs: Sequence[TokenisedPreference], padding: int, num_tokens: int) -> int:
    """`padding`, or another token where that ends sequences."""
    last = {ids[-1] for one in pairs for ids in (one.prompt_ids, one.chosen_ids, one.rejected_ids)}
    for token in (padding, *range(num_tokens)):
        if token not in last:
            return int(token)
    raise ValueError(f"each of the {num_tokens} tokens ends a prompt or a response: none is left to pad with")


def held_out_accuracy(model: Any, pairs: Sequence[TokenisedPreference], num_buckets: int) -> Accuracy:
    """How often, and how surely, the model scores the chosen response higher."""
    sequences = [
        TokenSequence(one.prompt_ids, response) for one in pairs for response in (one.chosen_ids, one.rejected_ids)
    ]
    with torch.no_grad():
        scored = scores(model.eval(), sequences)
    margins = [chosen - rejected for chosen, rejected in zip(scored[::2], scored[1::2], strict=True)]
    differences = [_difference(one) for one in pairs]
    return accuracy_of(margins, differences, length_buckets(differences, max(1, num_buckets)))


def load(path: str) -> tuple[PreTrainedModel, Any]:
    """The reward model and the tokenizer at `path`."""
    return AutoModelForSequenceClassification.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def _dataset(pairs: Sequence[TokenisedPreference]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt_ids": one.prompt_ids,
                "chosen_ids": [*one.prompt_ids, *one.chosen_ids],
                "rejected_ids": [*one.prompt_ids, *one.rejected_ids],
            }
            for one in pairs
        ]
    )


def _length(preference: TokenisedPreference) -> int:
    return len(preference.prompt_ids) + max(len(preference.chosen_ids), len(preference.rejected_ids))


def _difference(preference: TokenisedPreference) -> int:
    return len(preference.chosen_ids) - len(preference.rejected_ids)
