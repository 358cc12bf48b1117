"""What the trainers without a critic refuse before anything has started: one line each, with the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trl
from transformers import TrainingArguments
from trl import import_utils

from fuse import (
    GRPOConfig,
    GRPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    ReinforcePlusPlusTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from . import tiny, tiny_group

with mock.patch.object(import_utils, "is_vllm_available", return_value=False):  # it would import any version
    from trl.experimental import online_dpo


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
    ("algorithm", "options", "message"),
    [
        (GRPOTrainer, {"advantage": "gae"}, "advantage='gae' is unknown: use 'group', 'leave_one_out', 'reinforce"),
        (GRPOTrainer, {"loss": "dpo"}, "loss='dpo' is unknown: use 'grpo', 'rloo' or 'proximal_rloo'"),
        (
            GRPOTrainer,
            {"loss": "rloo", "advantage": "reinforce++"},
            "a response is one action: use loss=",
        ),
        (
            GRPOTrainer,
            {"loss": "rloo", "beta": 0.1},
            "neither of which has a KL penalty: set beta=0, or advantage",
        ),
        (GRPOTrainer, {"loss": "rloo", "importance_sampling_level": "sequence"}, "does not take it: .* loss='grpo'"),
        (GRPOTrainer, {"loss": "proximal_rloo", "epsilon_high": 0.3}, "set loss='grpo' or 'rloo'"),
        (GRPOTrainer, {"advantage": "leave_one_out", "scale_rewards": "none"}, "set advantage='group' or 'grpovi'"),
        (GRPOTrainer, {"advantage": "grpovi", "num_generations": 1}, "num_generations=1: responses are compared"),
        (
            RLOOTrainer,
            {"advantage": "reinforce++"},
            "one action: use advantage='group', 'leave_one_out' or 'grpovi'",
        ),
        (RLOOTrainer, {"loss": "grpo"}, "loss='grpo' is unknown: use 'rloo' or 'proximal_rloo'"),
        (ReinforcePlusPlusTrainer, {"advantage": "group"}, "use 'reinforce\\+\\+' or 'reinforce\\+\\+-baseline'"),
        (ReinforcePlusPlusTrainer, {"gamma": 1.1}, "gamma=1.1 must lie between 0 and 1"),
        (ReinforcePlusPlusTrainer, {"reward_clip_range": (1.0, 1.0)}, "reward_clip_range=1.0 1.0 is empty"),
        (ReinforcePlusPlusTrainer, {"loss": "rloo"}, "loss='rloo' is unknown: use 'grpo'"),
        (RLOOTrainer, {"reward_clip_range": [1.0]}, "reward_clip_range=1.0 is .* no range: give a smaller and a"),
        (ReinforcePlusPlusTrainer, {"advantage": "reinforce++-baseline", "num_generations": 1}, "num_generations=1: "),
        (ReinforcePlusPlusTrainer, {"advantage": "reinforce++-baseline", "gamma": 0.9}, "gamma=0.9 with advantage="),
        (OnlineDPOTrainer, {"num_generations": 1}, "num_generations=1: .* at least 2"),
        (OnlineDPOTrainer, {"per_device_train_batch_size": 3}, "=3 is odd, and pairs stay together: choose an even"),
        (
            OnlineDPOTrainer,
            {"generation_batch_size": 12},
            "no multiple of per_device_train_batch_size=4 x 4 / 2",
        ),
        (OnlineDPOTrainer, {"loss_type": "hinge"}, "loss_type='hinge' is unknown: use 'sigmoid' or 'ipo'"),
        (OnlineDPOTrainer, {"beta": 0.0}, "beta=0.0 must be positive"),
        (OnlineDPOTrainer, {"beta": [0.1, 0.2]}, "is not one number"),
        (OnlineDPOTrainer, {"epsilon": 0.1}, "epsilon=0.1 is not supported: .* no ratio"),
        (OnlineDPOTrainer, {"max_new_tokens": 9}, "are both set, and do not agree"),
        (OnlineDPOTrainer, {"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0 must be positive"),
        (GRPOTrainer, {"max_dynamic_rounds": 3}, "max_dynamic_rounds=3 without dynamic_sampling"),
        (GRPOTrainer, {"overlong_buffer": 3}, "overlong_buffer=3 without overlong_penalty"),
        (GRPOTrainer, {"overlong_penalty": 1.0}, "overlong_penalty=1.0 without overlong_buffer"),
        (GRPOTrainer, {"overlong_penalty": 1.0, "overlong_buffer": 9}, "is more than overlong_max_length=8"),
        (
            GRPOTrainer,
            {"overlong_penalty": 1.0, "overlong_buffer": 2, "overlong_max_length": 10},
            "no response would be penalised",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_go_together(algorithm: type, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        tiny_group.trainer(tmp_path, algorithm=algorithm, **options)
    assert "\n" not in str(error.value)


def test_combinations_that_go_together(tmp_path: Path) -> None:
    for advantage in ("group", "leave_one_out", "grpovi"):
        for loss in ("grpo", "rloo", "proximal_rloo"):
            tiny_group.config(tmp_path, GRPOConfig, advantage=advantage, loss=loss)
    for advantage in ("reinforce++", "reinforce++-baseline"):
        tiny_group.config(tmp_path, GRPOConfig, advantage=advantage)
    tiny_group.config(tmp_path, GRPOConfig, advantage="reinforce++", num_generations=1)
    assert not GRPOConfig(advantage="grpovi", use_cpu=True).beta, "which needs a reference without a penalty"
    assert GRPOConfig(advantage="grpovi", use_cpu=True).needs_reference


def test_the_kl_penalty_is_in_one_place(tmp_path: Path) -> None:
    for advantage, of_reward in (("group", 0.0), ("grpovi", 0.0), ("leave_one_out", 0.1), ("reinforce++", 0.1)):
        config = tiny_group.config(tmp_path, GRPOConfig, advantage=advantage, beta=0.1)
        assert (config.beta_of_reward, config.beta_of_loss) == (of_reward, 0.1 - of_reward)


ORACLES = {
    "grpo": (GRPOConfig, trl.GRPOConfig),
    "rloo": (RLOOConfig, trl.RLOOConfig),
    "online-dpo": (OnlineDPOConfig, online_dpo.OnlineDPOConfig),
}


@pytest.mark.parametrize(("ours", "theirs"), ORACLES.values(), ids=ORACLES)
def test_every_option_of_trl_is_there_with_its_default(ours: Any, theirs: Any) -> None:
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    defaults = {field.name: field.default for field in dataclasses.fields(ours)}
    for field in dataclasses.fields(theirs):
        if field.name not in inherited:
            default = field.default_factory()[0] if callable(field.default_factory) else field.default  # of one epoch
            assert defaults[field.name] == default, field.name
    assert defaults["learning_rate"] == {f.name: f.default for f in dataclasses.fields(theirs)}["learning_rate"]
