"""The configurations on which the trainer is compared with the oracle, and the tiny models and prompts they train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .. import tiny_models

VOCABULARY_SIZE = 24
PAD, EOS = 3, 5

# Clip ranges are such that the first updates already clip. Adam's epsilon is far above the rounding noise of gradients,
# which Adam otherwise scales up to whole steps wherever a gradient happens to vanish. BASELINE has the default.
OPTIONS: Mapping[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "total_episodes": 24,
    "response_length": 10,
    "num_ppo_epochs": 2,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-4,
    "kl_coef": 0.2,
    "cliprange": 0.02,
    "cliprange_value": 0.02,
    "max_grad_norm": 0.0,
    "num_sample_generations": 0,
    "local_rollout_forward_batch_size": 5,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run of the oracle.

    options: PPOConfig's, over OPTIONS.
    pad_is_eos: one token for both, as where a tokenizer has no padding token of its own.
    eos_in_prompts: prompts hold eos inside; where it is padding too, the oracle overlooks it.
    pad_is_sampled: the policy generates padding tokens in the middle of responses.
    past_stop: the generator does not stop, so responses run on after their stop token.
    own_reference: false passes ref_model=None, and the policy's copy is the reference.
    lora: `LoraConfig`'s, of an adapter on the policy; None for none. ref_adapter: the policy comes with it, and with
        another, which is the reference.
    quirks: whether the oracle does here what `trl_quirks=True` is for.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    architecture: Literal["llama", "gpt_neox"] = "llama"
    tie_word_embeddings: bool = False
    pad_is_eos: bool = False
    eos_in_prompts: bool = False
    pad_is_sampled: bool = False
    past_stop: bool = False
    own_reference: bool = True
    num_key_value_heads: int = 1
    num_layers: int = 2
    num_prompts: int = 64
    lora: Mapping[str, Any] | None = field(default=None, hash=False)
    ref_adapter: bool = False
    quirks: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def pad_token_id(self) -> int:
        return EOS if self.pad_is_eos else PAD

    @property
    def training_options(self) -> dict[str, Any]:
        return {**OPTIONS, **self.options}

    @property
    def batch_size(self) -> int:
        options = self.training_options
        return int(options["per_device_train_batch_size"] * options["gradient_accumulation_steps"])


BASELINE = Case(name="baseline", options={"adam_epsilon": 1e-8}, quirks=False)
EARLY_STOPS = Case(name="early_stops", options={"stop_token": "eos"})
DEEP = Case(name="deep", options={"stop_token": "eos"}, num_layers=4, num_key_value_heads=2)
MINI_BATCHES = Case(
    name="mini_batches",
    options={"num_mini_batches": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
)
PAST_STOP = Case(name="past_stop", options={"stop_token": "eos", "missing_eos_penalty": 0.5}, past_stop=True)

LORA: Mapping[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}

CASES: tuple[Case, ...] = (
    BASELINE,
    EARLY_STOPS,
    Case(name="missing_eos_penalty", options={"stop_token": "eos", "missing_eos_penalty": 1.5}, own_reference=False),
    Case(name="whiten_rewards", options={"stop_token": "eos", "whiten_rewards": True}),
    Case(name="k3", options={"stop_token_id": EOS, "kl_estimator": "k3"}),
    MINI_BATCHES,
    Case(
        name="accumulation",
        options={"stop_token": "eos", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ),
    Case(name="one_epoch", options={"stop_token": "eos", "num_ppo_epochs": 1, "gamma": 0.9, "lam": 0.8}),
    Case(
        name="four_epochs", options={"num_ppo_epochs": 4, "gamma": 0.97, "lam": 0.5, "temperature": 1.3}, quirks=False
    ),
    Case(
        name="optimizer_options",
        options={
            "weight_decay": 0.1,
            "adam_beta1": 0.8,
            "adam_beta2": 0.99,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "total_episodes": 40,
        },
        quirks=False,
    ),
    Case(name="pad_is_eos", options={"stop_token": "eos"}, pad_is_eos=True),
    Case(name="pad_in_prompts", options={"stop_token": "eos"}, pad_is_eos=True, eos_in_prompts=True),
    Case(name="pad_is_sampled", options={"stop_token": "eos", "missing_eos_penalty": 0.5}, pad_is_sampled=True),
    Case(name="gpt_neox", options={"stop_token": "eos"}, architecture="gpt_neox"),
    Case(name="tied_embeddings", options={"stop_token": "eos"}, tie_word_embeddings=True),
    Case(name="end_of_pass", options={"stop_token": "eos"}, num_prompts=16),
    PAST_STOP,
    Case(name="lora", options={"stop_token": "eos", "learning_rate": 3e-3}, lora=LORA, own_reference=False),
    Case(
        name="ref_adapter",
        options={"stop_token": "eos", "ref_adapter_name": "ref"},
        lora=LORA,
        ref_adapter=True,
        own_reference=False,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    policy: PreTrainedModel
    reference: PreTrainedModel | None
    reward: PreTrainedModel
    value: PreTrainedModel


def build_models(case: Case) -> Models:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tiny_models.config(case.architecture, **_model_options(case))
        policy = AutoModelForCausalLM.from_config(config)
        reference = AutoModelForCausalLM.from_config(config)
        reward = AutoModelForSequenceClassification.from_config(config)
        value = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        if not case.tie_word_embeddings:
            _set_token_biases(policy, case)
            _set_token_biases(reference, case)
        # The reference is near the policy, as in practice: far away, the KL penalty would drown the score.
        for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
            ours.lerp_(theirs, 0.7)
    if case.ref_adapter:
        policy = get_peft_model(policy, LoraConfig(**case.lora))
        policy.add_adapter("ref", LoraConfig(**case.lora))
    return Models(policy=policy, reference=reference if case.own_reference else None, reward=reward, value=value)


def peft_config(case: Case) -> LoraConfig | None:
    """What both trainers are given."""
    return None if case.lora is None or case.ref_adapter else LoraConfig(**case.lora)


def draw_adapters(model: torch.nn.Module) -> None:
    """The same values for the same names, none of which is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for _, parameter in sorted((name, one) for name, one in model.named_parameters() if ".lora_" in name):
            torch.nn.init.normal_(parameter, std=0.1)


def _model_options(case: Case) -> dict[str, Any]:
    options = {
        "vocab_size": VOCABULARY_SIZE,
        "pad_token_id": case.pad_token_id,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "intermediate_size": 32,
        "num_hidden_layers": case.num_layers,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "num_labels": 1,
        "tie_word_embeddings": case.tie_word_embeddings,
    }
    if case.architecture == "llama":
        options["num_key_value_heads"] = case.num_key_value_heads
    return options


def _set_token_biases(model: PreTrainedModel, case: Case) -> None:
    """Give every hidden state a common first coordinate, and head rows a coefficient for it: a bias per token.

    A trained model hardly ever generates padding and does generate eos; so should these.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings.weight[:, 0] = 3.0
    head.weight[:, 0] = 0.0
    head.weight[EOS, 0] = 0.3
    if not case.pad_is_eos:
        head.weight[PAD, 0] = 0.3 if case.pad_is_sampled else -10.0


def build_tokenizer(case: Case) -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY_SIZE) if index not in (PAD, EOS)}
    return tiny_models.word_tokenizer(
        {**words, "[PAD]": PAD, "[EOS]": EOS},
        unknown="w0",
        pad_token="[EOS]" if case.pad_is_eos else "[PAD]",
        eos_token="[EOS]",
        padding_side="left",
    )


def build_dataset(case: Case) -> Dataset:
    """Prompts of two to six ordinary tokens."""
    random = np.random.default_rng(2)
    lengths = random.integers(2, 7, size=case.num_prompts)
    prompts = [random.integers(6, VOCABULARY_SIZE, size=length).tolist() for length in lengths]
    if case.eos_in_prompts:
        prompts = [[*prompt[:1], EOS, *prompt[1:]] for prompt in prompts]
    return Dataset.from_dict({"input_ids": prompts})
