"""The configurations on which the trainers without a critic are compared with TRL's, and what these train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from .. import tiny_models
from .cases import LORA

VOCABULARY_SIZE = 24
PAD, EOS = 3, 5

# Ratios leave their bounds soon, so that clipping counts; Adam's epsilon is far above the rounding noise of gradients.
OPTIONS: Mapping[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 10,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-4,
    "epsilon": 0.02,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCase:
    """One run of the oracle. options: of its configuration, over OPTIONS. abstains: whether a function returns None."""

    name: str
    algorithm: Literal["grpo", "rloo"] = "grpo"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    abstains: bool = False
    tie_word_embeddings: bool = False
    has_adapter: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def training_options(self) -> dict[str, Any]:
        return {**OPTIONS, **self.options}


def _grpo(name: str, **options: Any) -> GroupCase:
    return GroupCase(name=name, options=options)


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
_REUSED = {"steps_per_generation": 4, "num_iterations": 2}

DAPO = _grpo("dapo", loss_type="dapo")
REUSED = {loss: _grpo(f"{loss}-reused-beta", loss_type=loss, beta=0.04, **_REUSED) for loss in LOSS_TYPES}
GSPO = _grpo("gspo", loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-3, epsilon_high=4e-3, **_REUSED)
ENTROPY = _grpo("entropy-bonus", entropy_coef=0.2, top_entropy_quantile=0.6, beta=0.04, **_REUSED)
FOLLOWING = _grpo(  # the reference moves in the middle of an update, and at its end
    "following",
    beta=0.3,
    max_steps=8,
    sync_ref_model=True,
    ref_model_mixup_alpha=0.7,
    ref_model_sync_steps=2,
    **_REUSED,
)
RLOO = GroupCase(name="rloo", algorithm="rloo")

CASES: tuple[GroupCase, ...] = (
    *(_grpo(f"{loss}", loss_type=loss) for loss in LOSS_TYPES if loss != "dapo"),
    DAPO,
    *REUSED.values(),
    GSPO,
    *(_grpo(f"steps-{steps}-{uses}", steps_per_generation=steps, num_iterations=uses, beta=0.04 * (uses == 2))
      for steps in (1, 2, 4) for uses in (1, 2) if (steps, uses) != (4, 2)),
    _grpo("luspo-sequence", loss_type="luspo", importance_sampling_level="sequence", epsilon=3e-3, **_REUSED),
    _grpo("unscaled", loss_type="dr_grpo", scale_rewards="none"),
    _grpo("scaled-by-batch", scale_rewards="batch", steps_per_generation=1),
    _grpo("normalised-apart", multi_objective_aggregation="normalize_then_sum", reward_weights=[0.3, 2.0]),
    _grpo("two-bounds", delta=1.01, epsilon_high=0.025, **_REUSED),
    _grpo("unweighted-kl", beta=0.1, use_bias_correction_kl=False, **_REUSED),
    _grpo("high-entropy", top_entropy_quantile=0.4),
    ENTROPY,
    _grpo("off-policy-mask", off_policy_mask_threshold=0.002, **_REUSED),
    _grpo("truncated", mask_truncated_completions=True, loss_type="grpo"),
    _grpo("hot", temperature=1.7, beta=0.04),
    FOLLOWING,
    GroupCase(name="abstaining", options={"reward_weights": [1.0, 0.5]}, abstains=True),
    GroupCase(name="tied", tie_word_embeddings=True),
    GroupCase(name="lora", options={"beta": 0.1, **_REUSED, "learning_rate": 3e-3}, has_adapter=True),
    RLOO,
    GroupCase(name="rloo-reused", algorithm="rloo", options={"beta": 0.0, **_REUSED}),
    GroupCase(
        name="rloo-normalised",
        algorithm="rloo",
        options={"normalize_advantages": True, "reward_clip_range": (-0.5, 0.8), "beta": 0.0},
    ),
    GroupCase(name="rloo-abstaining", algorithm="rloo", abstains=True),
)  # fmt: skip


def build_policy(case: GroupCase) -> PreTrainedModel:
    """The same weights at every call; responses end early, and not all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tiny_models.config(
            "llama",
            vocab_size=VOCABULARY_SIZE,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
            intermediate_size=32,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=case.tie_word_embeddings,
        )
        return AutoModelForCausalLM.from_config(config)


def peft_config(case: GroupCase) -> LoraConfig | None:
    """What both trainers are given."""
    return LoraConfig(**LORA) if case.has_adapter else None


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY_SIZE) if index not in (PAD, EOS)}
    return tiny_models.word_tokenizer(
        {**words, "[PAD]": PAD, "[EOS]": EOS},
        unknown="w0",
        pad_token="[PAD]",
        eos_token="[EOS]",
        padding_side="left",
    )


def build_dataset() -> Dataset:
    """Prompts of two to five words, and a column for the reward functions."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 6, (48,), generator=generator).tolist()
    prompts = [
        " ".join(f"w{token}" for token in torch.randint(6, VOCABULARY_SIZE, (length,), generator=generator).tolist())
        for length in lengths
    ]
    return Dataset.from_dict({"prompt": prompts, "wanted": [f"w{6 + index % 12}" for index in range(len(prompts))]})


def count_wanted(completions: list[str], wanted: list[str], **kwargs: Any) -> list[float]:
    return [
        0.3 * text.split().count(word) + 0.1 * len(set(text.split()))
        for text, word in zip(completions, wanted, strict=True)
    ]


def brevity(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [0.5 - 0.07 * len(ids) + 0.02 * len(prompt) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def brevity_of_some(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Says nothing of responses with an even number of tokens."""
    return [
        reward if len(ids) % 2 else None
        for reward, ids in zip(brevity(prompts, completion_ids), completion_ids, strict=True)
    ]


def sometimes_wanted(completions: list[str], wanted: list[str], **kwargs: Any) -> list[float | None]:
    """Says nothing of short responses."""
    rewards = count_wanted(completions, wanted)
    return [reward if len(text.split()) > 2 else None for reward, text in zip(rewards, completions, strict=True)]


def reward_functions(case: GroupCase) -> list[Any]:
    return [sometimes_wanted, brevity_of_some] if case.abstains else [count_wanted, brevity]
