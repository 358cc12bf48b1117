"""OnlineDPOConfig: every option of an online DPO run, with TRL's names and defaults where TRL has the option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from fuse.algorithms.group_batch import Penalty
from fuse.algorithms.online_dpo import PAIR
from fuse.config.group import GroupConfig
from fuse.config.option import option

_REFUSED = "Accepted for compatibility; must stay unset."
_NO_RATIO = "leave it out: the loss has no ratio to be clipped"
_MOST_TOKENS = 64


@dataclass
class OnlineDPOConfig(GroupConfig):
    """Arguments of `OnlineDPOTrainer`: those of `GroupConfig` plus its own, as TRL's has them (trl 1.12).

    Of the `num_generations` responses to a prompt, in TRL two, the best and the worst are trained on.
    `per_device_train_batch_size` counts responses, two to a pair, of which a micro-batch has both or none: TRL counts
    prompts.

    Source: Guo et al. 2024 (arXiv 2402.04792).

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (*GroupConfig.AT_LEAST_ONE, "max_new_tokens")
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = tuple(name for name in GroupConfig.NOT_NEGATIVE if name != "beta")
    POSITIVE: ClassVar[tuple[str, ...]] = (*GroupConfig.POSITIVE, "beta")
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {**GroupConfig.CHOICES, "loss_type": ("sigmoid", "ipo")}
    MAX_RESPONSE_OPTION: ClassVar[str] = "max_new_tokens"
    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        **GroupConfig.UNSUPPORTED,
        "epsilon": _NO_RATIO,
        "epsilon_high": _NO_RATIO,
        "mask_truncated_completions": "leave it out: a pair needs both; missing_eos_penalty makes such responses worse",
        "max_length": "leave it out: prompts are kept whole, or handled as long_prompts says",
        "reward_model_path": "leave it out: pass the reward model, or its path, as one of reward_funcs",
    }

    learning_rate: float = option(5e-7, "The initial learning rate for AdamW.")
    num_generations: int = option(
        PAIR, "Responses to every prompt, of which the best and the worst are trained on: at least 2."
    )
    max_new_tokens: int = option(_MOST_TOKENS, "Most tokens of a response.")
    max_completion_length: int | None = option(None, "The same as max_new_tokens.")  # type: ignore[assignment]
    generation_batch_size: int | None = option(
        None,
        "Samples of a rollout. Default: per_device_train_batch_size times steps_per_generation, and that times "
        "num_generations / 2.",
    )
    temperature: float = option(0.9, "Sampling temperature.")
    beta: float = option(0.1, "How strongly the policy is held to the reference; for 'ipo' its tau.")
    loss_type: str = option(
        "sigmoid", "Loss of a pair: 'sigmoid', DPO's (arXiv 2305.18290), or 'ipo' (arXiv 2310.12036)."
    )
    missing_eos_penalty: float | None = option(
        None, "What is taken off the reward of a response that does not end by itself."
    )

    disable_dropout: bool = option(True, "Accepted for compatibility; no effect.")
    epsilon: float = option(0.2, _REFUSED)
    epsilon_high: float | None = option(None, _REFUSED)
    mask_truncated_completions: bool = option(False, _REFUSED)
    max_length: int = option(512, _REFUSED)
    reward_model_path: str | None = option(None, _REFUSED)
    vllm_gpu_memory_utilization: float | None = option(0.55, _REFUSED)  # type: ignore[assignment]

    @property
    def num_trained(self) -> int:
        return PAIR

    @property
    def num_together(self) -> int:
        return PAIR

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def penalties(self) -> Mapping[str, Penalty]:
        if (penalty := self.missing_eos_penalty) is None:
            return super().penalties
        return {**super().penalties, "missing_eos_penalty": partial(_of_unended, penalty=penalty)}

    def __post_init__(self) -> None:
        beta: Any = self.beta
        if isinstance(beta, Sequence):  # TRL takes one for every epoch
            if len(beta) != 1:
                raise ValueError(f"beta={beta!r} is not one number: give one for the whole run")
            self.beta = beta[0]
        if self.max_completion_length is not None:
            if self.max_new_tokens not in (_MOST_TOKENS, self.max_completion_length):
                raise ValueError(
                    f"max_new_tokens={self.max_new_tokens} and max_completion_length={self.max_completion_length} are "
                    f"both set, and do not agree: set max_new_tokens"
                )
            self.max_new_tokens = self.max_completion_length
        self.max_completion_length = self.max_new_tokens
        super().__post_init__()

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.missing_eos_penalty is not None and not self.missing_eos_penalty > 0:
            raise ValueError(
                f"missing_eos_penalty={self.missing_eos_penalty} must be positive: it is taken off the reward; leave "
                f"it out for none"
            )

    def _check_combinations(self) -> None:
        if self.per_device_train_batch_size % PAIR:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} is odd, and pairs stay together: "
                f"choose an even number of responses"
            )
        super()._check_combinations()


def _of_unended(lengths: Tensor, ended: Tensor, *, penalty: float) -> Tensor:
    return -penalty * (~ended).float()
