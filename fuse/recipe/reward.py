"""A reward model from preferences, by TRL's RewardTrainer: a sequence classifier with one output.

Beyond TRL's: preferences that contradict each other are dropped, lengths balanced, a regulariser of ChatGLM-RLHF
(arXiv 2404.00934), and its accuracy on held-out pairs by their difference of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from trl import RewardTrainer

from fuse.recipe.accuracy import Accuracy, accuracy_of, save_calibration
from fuse.recipe.balance import balanced_by_length, length_buckets
from fuse.recipe.preferences import preferences_of, without_contradictions
from fuse.recipe.tokens import TokenisedPreference, tokenised
from fuse.recipe.training import TrainingStep, parsed, read_tokenised, run_trainer
from fuse.trainers.data import read_rows
from fuse.training.scoring import TokenSequence, scores

CALIBRATION = "calibration.png"


def train_reward_model(step: TrainingStep) -> dict[str, Any]:
    """Train, and save the model with a picture of its calibration; returns what was trained on, and held-out accuracy.

    Raises: ValueError where no pairs are left to train on.
    """
    config = parsed("reward", step)
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
    print("reward: " + ", ".join(f"{name.removeprefix('num_').replace('_', ' ')} {n}" for name, n in counts.items()))
    if not kept:
        raise ValueError("no pair is left to train on: give more, or set --reward.length_buckets 0")
    trainer = SquareRegularisedTrainer(
        model=step.model, args=config, train_dataset=_pairs(kept), processing_class=tokenizer
    )
    run_trainer(trainer, "reward")
    held_out = read_tokenised(step.held_out, tokenizer)
    accuracy = held_out_accuracy(trainer.model, held_out, config.length_buckets) if held_out else None
    if accuracy is not None:
        save_calibration(accuracy, Path(step.output_dir) / CALIBRATION)
    return {
        **counts,
        "held_out": accuracy and asdict(accuracy),
        "log_history": trainer.state.log_history,
    }


class SquareRegularisedTrainer(RewardTrainer):
    """Adds `square_coefficient` times the mean of r_chosen² + r_rejected², a Gaussian prior around zero.

    TRL's own `center_rewards_coefficient` weighs (r_chosen + r_rejected)², which leaves the difference free.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        compute: Any = super().compute_loss
        loss, outputs = compute(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        config: Any = self.args
        if config.square_coefficient:
            loss = loss + config.square_coefficient * 2 * outputs.logits.float().square().mean()
        return (loss, outputs) if return_outputs else loss


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


def _pairs(preferences: Sequence[TokenisedPreference]) -> Dataset:
    return Dataset.from_list(
        [
            {"chosen_ids": [*one.prompt_ids, *one.chosen_ids], "rejected_ids": [*one.prompt_ids, *one.rejected_ids]}
            for one in preferences
        ]
    )


def _length(preference: TokenisedPreference) -> int:
    return len(preference.prompt_ids) + max(len(preference.chosen_ids), len(preference.rejected_ids))


def _difference(preference: TokenisedPreference) -> int:
    return len(preference.chosen_ids) - len(preference.rejected_ids)
