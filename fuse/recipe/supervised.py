"""Supervised fine-tuning on the chosen responses, by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTTrainer

from fuse.recipe.tokens import TokenisedPreference
from fuse.recipe.training import TrainingStep, parsed, read_tokenised, train

_IGNORED = -100
"""The label of tokens that do not count."""


def fine_tune(step: TrainingStep) -> dict[str, Any]:
    """Train, and save the model; returns the loss on held-out rows before and after, in nats per token of a response.

    The loss is of responses alone, with their end; rows that are longer than `max_length` are cut there.
    """
    config = parsed("sft", step)
    tokenizer = AutoTokenizer.from_pretrained(step.model)
    rows, held_out = (read_tokenised(path, tokenizer) for path in (step.data, step.held_out))
    trainer = SFTTrainer(
        model=step.model,
        args=config,
        train_dataset=_labelled(rows),
        eval_dataset=_labelled(held_out) if held_out else None,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"] if held_out else None
    train(trainer, "sft")
    trainer.save_model(step.output_dir)
    after = trainer.evaluate()["eval_loss"] if held_out else None
    is_cut = [config.max_length is not None and len(row["input_ids"]) > config.max_length for row in map(_labels, rows)]
    return {
        "num_rows": len(rows),
        "num_cut": sum(is_cut),
        "held_out_loss_before": before,
        "held_out_loss": after,
        "log_history": trainer.state.log_history,
    }


def _labelled(preferences: Sequence[TokenisedPreference]) -> Dataset:
    return Dataset.from_list([_labels(one) for one in preferences])


def _labels(preference: TokenisedPreference) -> dict[str, list[int]]:
    prompt, chosen = preference.prompt_ids, preference.chosen_ids
    return {"input_ids": [*prompt, *chosen], "labels": [_IGNORED] * len(prompt) + chosen}
