"""What the trainers without a critic refuse before anything has started: one line each, with the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import TrainingArguments

from fuse import GRPOConfig, RLOOConfig

from . import tiny, tiny_group


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations=1: responses are compared with others"),
        ({"num_generations": 3}, "generation_batch_size=8 .* is no multiple of num_generations=3"),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, "neither divides nor is a multiple of"),
        ({"generation_batch_size": 6}, "generation_batch_size=6 is no multiple of per_device_train_batch_size=4"),
        ({"loss_type": "ppo"}, "loss_type='ppo' is unknown: use 'grpo', "),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word' is unknown"),
        ({"scale_rewards": "all"}, "scale_rewards='all' is unknown"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True is not supported: leave it out"),
        ({"sync_ref_model": True}, "sync_ref_model=True with beta=0.0, for which there is no reference"),
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha=1.5 must lie between 0 and 1"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps=0 must be at least 1"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server' is not supported"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs=.* is not supported: leave it out: set temp"),
        (
            {"engine": "vllm", "num_iterations": 2, "steps_per_generation": 2, "old_logprobs": "engine"},
            "set old_logprobs='trainer'",
        ),
        ({"old_logprobs": "sampler"}, "old_logprobs='sampler' is unknown: use 'auto', 'engine' or 'trainer'"),
        ({"scoring": "half"}, "scoring='half' is unknown: use 'auto', 'whole' or 'sharded'"),
        (
            {"engine": "vllm", "loss_type": "vespo"},
            "loss_type='vespo' with vllm_importance_sampling_mode='sequence_mask'",
        ),
        ({"top_p": 0.0}, "top_p=0.0 must lie between 0 and 1"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 weights for 1 reward functions"),
        ({"rewards": []}, "reward_funcs is empty: pass a function"),
        ({"rewards": [3]}, "reward_funcs has 3: pass functions"),
        (
            {"rewards": [tiny.scorer(1), tiny.scorer(2)], "reward_processing_classes": [tiny.tokenizer()]},
            "reward_processing_classes has 1 tokenizers for 2 reward functions",
        ),
        (
            {"rewards": [tiny.scorer(1), tiny.scorer(2, num_labels=2)]},
            "is a LlamaForSequenceClassification with 2 labels",
        ),
        ({"train_dataset": [{"question": "ab"}] * 8}, "the dataset has no column 'prompt'"),
        ({"train_dataset": [{"prompt": "ab", "completions": 1}] * 8}, "has a column 'completions'"),
        ({"model": tiny.scorer(1)}, "without output embeddings: pass a causal language model"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy='steps' without eval_dataset"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "reward_processing_classes" not in options and isinstance(options.get("rewards"), Sequence):
        options = {**options, "reward_processing_classes": [tiny.tokenizer()] * len(options["rewards"])}
    with pytest.raises(ValueError, match=message) as error:
        tiny_group.trainer(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_a_function_that_cannot_be_called_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not take 'completion_ids', which it is given: define it as"):
        tiny_group.trainer(tmp_path, rewards=lambda prompts, completions: [0.0])
    with pytest.raises(ValueError, match=r"has no column 'answer', which reward function"):
        tiny_group.trainer(tmp_path, rewards=lambda completions, answer, **kwargs: [0.0])

    def logging(log_metric: Any, **kwargs: Any) -> list[float]:
        return []

    with pytest.raises(ValueError, match="it is given in threads alone: set reward_workers='thread'"):
        tiny_group.trainer(tmp_path, rewards=logging, reward_workers="process")


@pytest.mark.parametrize(
    ("ours", "theirs"), [(GRPOConfig, trl.GRPOConfig), (RLOOConfig, trl.RLOOConfig)], ids=["grpo", "rloo"]
)
def test_every_option_of_trl_is_there_with_its_default(ours: Any, theirs: Any) -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    defaults = {field.name: field.default for field in dataclasses.fields(ours)}
    for field in dataclasses.fields(theirs):
        if field.name not in inherited:
            assert defaults[field.name] == field.default, field.name
    assert defaults["learning_rate"] == 1e-6
