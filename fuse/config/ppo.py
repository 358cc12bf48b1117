"""PPOConfig: every option of a PPO run, with TRL's names and defaults where TRL has the option."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fuse.algorithms.kl_control import LARGEST_ERROR, KLControl
from fuse.config.clip_range import clip_range
from fuse.config.option import option
from fuse.config.run import RunConfig

_KL_TARGET, _KL_HORIZON = 6.0, 10_000
"""Of TRL's AdaptiveKLController (trl 0.11), which trl 1.12 has no more."""
_VARIANCE_SAMPLES = 4


@dataclass
class PPOConfig(RunConfig):
    """Arguments of `PPOTrainer`: those of `RunConfig` plus PPO's own.

    The names and defaults are those of TRL's PPOConfig (trl 1.12), with two exceptions that TRL sets but never
    applies: `gradient_checkpointing` is off by default, and `bf16` defaults to true on a GPU that has it and to
    false on a CPU. Both take effect here.

    The batch is a property of this configuration, never of the number of devices: one update consumes
    `per_device_train_batch_size * gradient_accumulation_steps` prompts wherever it runs, so results do not
    change with `num_devices`.

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        *RunConfig.AT_LEAST_ONE,
        *("num_ppo_epochs", "num_mini_batches", "total_episodes", "response_length"),
        *("local_rollout_forward_batch_size", "critic_stages"),
        *("critic_ppo_epochs", "critic_num_mini_batches", "kl_horizon"),
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        *RunConfig.NOT_NEGATIVE,
        *("kl_coef", "vf_coef", "critic_learning_rate", "critic_warmup_updates", "min_reward_variance"),
    )
    POSITIVE: ClassVar[tuple[str, ...]] = (
        *RunConfig.POSITIVE,
        *("temperature", "cliprange", "cliprange_value", "kl_target"),
    )
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **RunConfig.CHOICES,
        "reward_baseline": ("none", "reference"),
        "kl_estimator": ("k1", "k3"),
        "loss_normalization": ("micro_batch", "token"),
    }
    NOT_IN_TRL: ClassVar[Mapping[str, object]] = {
        "critic_ppo_epochs": None,
        "critic_num_mini_batches": None,
        "critic_warmup_updates": 0,
        "loss_normalization": "micro_batch",
        "auxiliary_dataset": None,
    }
    """What optimizer steps consist of, where they are not TRL's: options, and their values that leave them so."""

    MAX_RESPONSE_OPTION: ClassVar[str] = "response_length"
    PADDING_ENDS_RESPONSES: ClassVar[bool] = True

    learning_rate: float = option(3e-6, "The initial learning rate for AdamW.")
    logging_steps: float = option(10, "Updates between two logs for callbacks that ask.")
    num_ppo_epochs: int = option(4, "Passes over each rollout batch.")
    num_mini_batches: int = option(1, "Optimizer steps per pass.")
    total_episodes: int | None = option(
        None, "Prompts to train on, in all. Default: num_train_epochs passes over the dataset."
    )
    response_length: int = option(53, "Most tokens of a response.")
    temperature: float = option(0.7, "Sampling temperature.")
    missing_eos_penalty: float | None = option(
        None, "Subtracted from the score of a response without end-of-sequence token."
    )
    reward_baseline: Literal["none", "reference"] = option(
        "none",
        "What is taken off scores: 'reference', the score of a response of the reference model to the same prompt. All "
        "of these are generated and scored before training, and kept in checkpoints. missing_eos_penalty and "
        "reward_clip_range are of what is left.",
    )
    reward_clip_range: list[float] | None = option(
        None, "Bounds of scores, less reward_baseline and missing_eos_penalty and before the KL penalty."
    )
    min_reward_variance: float | None = option(
        None,
        "Leave out prompts to which reward_variance_samples responses of the reference, generated and scored before "
        "training, have scores of a sample variance below this, or equal ones. Kept in checkpoints. Default: none.",
    )
    reward_variance_samples: int = option(
        _VARIANCE_SAMPLES, "Responses to a prompt of which min_reward_variance takes the variance; at least 2."
    )
    whiten_rewards: bool = option(False, "Scale rewards to unit variance over the batch.")
    kl_coef: float = option(0.05, "Weight of the KL penalty per token; with adaptive_kl of the first update.")
    adaptive_kl: bool = option(
        False, "After every update, raise kl_coef where the KL is above kl_target, and lower it where it is below."
    )
    kl_target: float | None = option(
        None, f"KL of a response that adaptive_kl holds to, in nats. Default: {_KL_TARGET:g}."
    )
    kl_horizon: int | None = option(
        None,
        "Samples in which adaptive_kl changes kl_coef by a fifth while the KL is far from its target. "
        f"Default: {_KL_HORIZON}.",
    )
    kl_estimator: Literal["k1", "k3"] = option("k1", "KL estimator.")
    cliprange: float = option(0.2, "Clip range of the probability ratio.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    cliprange_value: float | None = option(0.2, "Clip range of the value's change; none for no clipping.")
    loss_normalization: Literal["micro_batch", "token"] = option(
        "micro_batch",
        "What counts the same in an optimizer step: every micro-batch, as in TRL, or every token of all of them.",
    )
    critic_learning_rate: float | None = option(
        None, "The critic's initial learning rate, on the same schedule. Default: learning_rate."
    )
    critic_ppo_epochs: int | None = option(
        None, "The critic's passes over each rollout batch. Default: num_ppo_epochs."
    )
    critic_num_mini_batches: int | None = option(
        None, "The critic's optimizer steps per pass. Default: num_mini_batches."
    )
    critic_warmup_updates: int = option(
        0, "First updates that train the critic alone, while the policy stays as it is."
    )
    gamma: float = option(1.0, "Discount factor.")
    lam: float = option(0.95, "Lambda of generalised advantage estimation.")
    local_rollout_forward_batch_size: int = option(64, "Most samples in one inference micro-batch.")
    sft_model_path: str = option("EleutherAI/pythia-160m", "For scripts: the policy's path.")
    reward_model_path: str = option("EleutherAI/pythia-160m", "For scripts: the reward model's path.")
    dataset_num_proc: int | None = option(None, "For scripts: processes that tokenise the dataset.")
    model_adapter_name: str | None = option(None, "For scripts: the policy's adapter that trains.")
    ref_adapter_name: str | None = option(None, "For scripts: the policy's adapter that is the reference.")
    ds3_gather_for_generation: bool = option(True, "Accepted for compatibility; no effect.")

    world_size: int | None = option(None, "Filled in by the trainer: always 1.")
    num_total_batches: int | None = option(None, "Filled in by the trainer.")
    micro_batch_size: int | None = option(None, "Filled in by the trainer.")
    local_batch_size: int | None = option(None, "Filled in by the trainer.")
    batch_size: int | None = option(None, "Filled in by the trainer.")
    local_mini_batch_size: int | None = option(None, "Filled in by the trainer.")
    mini_batch_size: int | None = option(None, "Filled in by the trainer.")

    critic_stages: int | None = option(
        None, "Pipeline stages of the critic, as of the actor. Default: as many as devices."
    )
    trl_quirks: bool = option(
        False, "Reproduce TRL's quirks (accumulation, ignored clipping, padded metrics) for comparisons."
    )

    @property
    def regroups(self) -> bool:
        return super().regroups and not self.trl_quirks

    @property
    def sampling_temperature(self) -> float:
        return self.temperature + 1e-7

    @property
    def max_response_tokens(self) -> int:
        return self.response_length

    @property
    def max_inference_samples(self) -> int:
        return self.local_rollout_forward_batch_size

    @property
    def own_learning_rates(self) -> Mapping[str, float]:
        return {} if self.critic_learning_rate is None else {"critic": self.critic_learning_rate}

    @property
    def kl_control(self) -> KLControl | None:
        """What kl_coef follows, if anything."""
        if not self.adaptive_kl:
            return None
        return KLControl(target=self.kl_target or _KL_TARGET, horizon=self.kl_horizon or _KL_HORIZON)

    @property
    def stages(self) -> Mapping[str, int | None]:
        return {**super().stages, "critic": self.critic_stages}

    def _check_ranges(self) -> None:
        super()._check_ranges()
        self.reward_clip_range = clip_range(self.reward_clip_range)
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1")

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.reward_variance_samples < 2:
            raise ValueError(
                f"reward_variance_samples={self.reward_variance_samples} must be at least 2: one score has no variance"
            )
        if self.min_reward_variance is None and self.reward_variance_samples != _VARIANCE_SAMPLES:
            raise ValueError(
                f"reward_variance_samples={self.reward_variance_samples} without min_reward_variance, which it is for: "
                f"set it, or leave this out"
            )
        changed = [name for name, value in self.NOT_IN_TRL.items() if getattr(self, name) != value]
        if self.trl_quirks and changed:
            raise ValueError(
                f"trl_quirks=True with {changed[0]}={getattr(self, changed[0])!r}, which TRL's steps do not have: "
                "leave one of them out"
            )
        if self.trl_quirks and self.regroup_micro_batches:
            raise ValueError(
                "trl_quirks=True with regroup_micro_batches=True, which changes what TRL's metrics average over: leave "
                "one of them out"
            )
        self._check_kl_control()

    def _check_kl_control(self) -> None:
        control = self.kl_control
        if control is None:
            for name in ("kl_target", "kl_horizon"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name}={value} without adaptive_kl, which it is for: set adaptive_kl=True")
            return
        if self.kl_coef == 0:
            raise ValueError("kl_coef=0 with adaptive_kl=True stays 0 whatever the KL is: start from a positive one")
        batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if not control.allows(batch_size):
            raise ValueError(
                f"kl_horizon={control.horizon} with updates of {batch_size} samples could turn kl_coef negative: "
                f"choose more than {LARGEST_ERROR * batch_size:g}"
            )
