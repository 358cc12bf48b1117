"""PPOConfig: every option of a run, with TRL's names and defaults where TRL has the option."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

_logger = logging.getLogger(__name__)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not known to be slow
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))


_AT_LEAST_ONE = (
    *("num_ppo_epochs", "num_mini_batches", "total_episodes", "response_length"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "local_rollout_forward_batch_size"),
    *("num_devices", "actor_stages", "critic_stages", "generation_batch_size", "inference_batch_tokens"),
    *("activation_memory_bytes", "tensor_parallel_size", "generation_cache_bytes"),
)
_CHOICES = {
    "kl_estimator": ("k1", "k3"),
    "migration_policy": ("adaptive", "threshold", "none"),
    "train_backend": ("transformers", "megatron"),
    "engine": ("transformers", "vllm"),
    "kv_transfer": ("object_store", "nixl"),
}


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `PPOTrainer`: `transformers.TrainingArguments` plus PPO's own and where it runs.

    The names and defaults are those of TRL's PPOConfig (trl 1.12), with two exceptions that TRL sets but never
    applies: `gradient_checkpointing` is off by default, and `bf16` defaults to true on a GPU that has it and to
    false on a CPU. Both take effect here.

    The batch is a property of this configuration, never of the number of devices: one update consumes
    `per_device_train_batch_size * gradient_accumulation_steps` prompts wherever it runs, so results do not
    change with `num_devices`.

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    learning_rate: float = _option(3e-6, "The initial learning rate for AdamW.")
    logging_steps: float = _option(10, "Updates between two logs for callbacks that ask.")
    bf16: bool | None = _option(  # type: ignore[assignment]  # None is replaced on construction
        None,
        "Compute in bfloat16 with fp32 weights. Default: on a GPU that supports it, not on a CPU. On CPUs it is for "
        "training and scoring; samples are generated in float32, for which alone there is native attention.",
    )

    num_ppo_epochs: int = _option(4, "Passes over each rollout batch.")
    num_mini_batches: int = _option(1, "Optimizer steps per pass.")
    total_episodes: int | None = _option(
        None, "Prompts to train on, in all. Default: num_train_epochs passes over the dataset."
    )
    response_length: int = _option(53, "Most tokens of a response.")
    stop_token: Literal["eos"] | None = _option(None, "'eos' ends a response at the tokenizer's end-of-sequence token.")
    stop_token_id: int | None = _option(None, "Token that ends a response; excludes stop_token.")
    temperature: float = _option(0.7, "Sampling temperature.")
    missing_eos_penalty: float | None = _option(
        None, "Subtracted from the score of a response without end-of-sequence token."
    )
    whiten_rewards: bool = _option(False, "Scale rewards to unit variance over the batch.")
    kl_coef: float = _option(0.05, "Weight of the KL penalty per token.")
    kl_estimator: Literal["k1", "k3"] = _option("k1", "KL estimator.")
    cliprange: float = _option(0.2, "Clip range of the probability ratio.")
    vf_coef: float = _option(0.1, "Weight of the value loss.")
    cliprange_value: float = _option(0.2, "Clip range of the value's change.")
    gamma: float = _option(1.0, "Discount factor.")
    lam: float = _option(0.95, "Lambda of generalised advantage estimation.")
    local_rollout_forward_batch_size: int = _option(64, "Most samples in one inference micro-batch.")
    num_sample_generations: int = _option(
        10, "Times completions of the evaluation prompts are shown during training; 0 for never."
    )
    sft_model_path: str = _option("EleutherAI/pythia-160m", "For scripts: the policy's path.")
    reward_model_path: str = _option("EleutherAI/pythia-160m", "For scripts: the reward model's path.")
    dataset_num_proc: int | None = _option(None, "For scripts: processes that tokenise the dataset.")
    model_adapter_name: str | None = _option(None, "Accepted for compatibility; must stay unset.")
    ref_adapter_name: str | None = _option(None, "Accepted for compatibility; must stay unset.")
    ds3_gather_for_generation: bool = _option(True, "Accepted for compatibility; no effect.")

    world_size: int | None = _option(None, "Filled in by the trainer: always 1.")
    num_total_batches: int | None = _option(None, "Filled in by the trainer.")
    micro_batch_size: int | None = _option(None, "Filled in by the trainer.")
    local_batch_size: int | None = _option(None, "Filled in by the trainer.")
    batch_size: int | None = _option(None, "Filled in by the trainer.")
    local_mini_batch_size: int | None = _option(None, "Filled in by the trainer.")
    mini_batch_size: int | None = _option(None, "Filled in by the trainer.")

    num_devices: int | None = _option(
        None, "GPUs, or CPU cores without one, to run on. Default: every GPU, or two cores."
    )
    ray_address: str | None = _option(None, "Join this Ray cluster instead of starting a local one.")
    actor_stages: int | None = _option(
        None,
        "Pipeline stages of the actor: a divisor of the devices, for data parallelism over the rest, or a multiple, "
        "for several stages per device. Default: as many as devices.",
    )
    critic_stages: int | None = _option(None, "Pipeline stages of the critic, likewise.")
    train_backend: Literal["transformers", "megatron"] = _option(
        "transformers", "What stages are made of: the Hugging Face model's own layers, or megatron-core's."
    )
    tensor_parallel_size: int = _option(1, "Devices that share each stage's matrices; needs train_backend='megatron'.")
    balance_stages: bool = _option(
        True, "Cut models into stages, and run the critic in the direction, that measured times favour; else evenly."
    )
    inter_stage_fusion: bool = _option(
        True, "Score samples while others are generated, and move long ones together; else stage by stage."
    )
    migration_policy: Literal["adaptive", "threshold", "none"] = _option(
        "adaptive",
        "Which samples move between engines: adaptive plans at every finish; threshold is RLHFuse's rule; none moves "
        "and scores nothing before all are generated.",
    )
    intra_stage_fusion: bool = _option(
        True, "Train actor and critic at once in one fused schedule; else one after the other (1F1B)."
    )
    schedule_time_limit_s: float = _option(10.0, "Most seconds to search for a fused schedule; few are needed anew.")
    replan_drift: float = _option(
        0.3, "Plan again once a stage's share of the time is off the plan by so much, 3 updates in a row."
    )
    activation_memory_bytes: int | None = _option(
        None, "Most bytes of activations on a device in fused training. Default: what a GPU has free; no limit on CPUs."
    )
    engine: Literal["transformers", "vllm"] = _option(
        "transformers", "What generates: transformers, or vLLM where it is installed. Tokens are the same."
    )
    generation_batch_size: int = _option(64, "Samples that one engine decodes at once.")
    generation_cache_bytes: int | None = _option(
        None,
        "Bytes of KV cache of each vLLM engine. Default: generation_batch_size samples of the model's full context, "
        "but at most a quarter of the device's memory.",
    )
    kv_transfer: Literal["object_store", "nixl"] = _option(
        "object_store",
        "How the KV of samples that move goes from engine to engine: through Ray's object store in host memory, or by "
        "NIXL, where it is installed, from device to device.",
    )
    inference_batch_tokens: int | None = _option(
        None,
        "Most tokens, padding included, in one inference micro-batch. Default: 16384 on GPUs, 2048 on CPUs, where more "
        "would leave the caches.",
    )
    worker_timeout_s: float = _option(1800.0, "Seconds without an answer after which a worker counts as lost.")
    trace_steps: int = _option(1, "Updates between two traces written to output_dir/traces; 0 for none.")
    trl_quirks: bool = _option(
        False, "Reproduce TRL's quirks (accumulation, ignored clipping, padded metrics) for comparisons."
    )

    def __post_init__(self) -> None:
        if self.fp16:
            raise ValueError("fp16=True is not supported (it needs loss scaling): set bf16=True or neither")
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = has_gpu and torch.cuda.is_bf16_supported()
        if self.bf16 and not has_gpu:
            self.use_cpu = True  # transformers allows bfloat16 on CPUs where they are asked for by name
            if not _multiplies_bfloat16():
                _logger.warning(
                    "bf16=True on a CPU without bfloat16 arithmetic (AVX-512 BF16 or AMX), slower than float32 "
                    "there: leave it out"
                )
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._check_ranges()
        self._check_choices()

    def _check_ranges(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("num_sample_generations", "trace_steps", "kl_coef", "vf_coef", "max_grad_norm"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        for name in (
            *("temperature", "cliprange", "cliprange_value", "worker_timeout_s"),
            *("schedule_time_limit_s", "replan_drift"),
        ):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie between 0 and 1")

    def _check_choices(self) -> None:
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id are both set: set one of them")
        if self.stop_token not in (None, "eos"):
            raise ValueError(
                f"stop_token={self.stop_token!r} is unknown: use 'eos', or stop_token_id for another token"
            )
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                *others, last = map(repr, choices)
                raise ValueError(f"{name}={value!r} is unknown: use {', '.join(others)} or {last}")
        if self.tensor_parallel_size > 1 and self.train_backend != "megatron":
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} with train_backend='transformers', whose stages "
                f"share no matrices: set train_backend='megatron', or leave it at 1"
            )
        if self.generation_cache_bytes is not None and self.engine != "vllm":
            raise ValueError(
                f"generation_cache_bytes={self.generation_cache_bytes} with engine={self.engine!r}, whose cache grows "
                "as needed: set engine='vllm', or leave it out"
            )
        if self.model_adapter_name is not None or self.ref_adapter_name is not None:
            raise ValueError(
                "PEFT adapters are not supported: merge them into the model and leave *_adapter_name unset"
            )
        if self.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(f"optim={self.optim} is not supported: use adamw_torch")

    @property
    def accelerator(self) -> Literal["cpu", "cuda"]:
        """What a device is: a GPU where there is one and `use_cpu` is not set, else a CPU core."""
        return "cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu"
