"""RunConfig: where a run takes place and how its stages are fused, whatever the algorithm."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from fuse.config.adapters import AdapterOptions
from fuse.config.auxiliary import AuxiliaryOptions
from fuse.config.averaging import AveragingOptions
from fuse.config.engine_options import EngineOptions
from fuse.config.inherited import check_inherited, check_optimizer
from fuse.config.option import either, option
from fuse.config.processor import warn_of_bfloat16
from fuse.config.tail_sharing import tail_sharing
from fuse.driver.mixing import Mixing

_MOST_INTEGER = 1 << 63
_NUM_SEEDS = 1 << 32  # what numpy takes


@dataclass
class RunConfig(EngineOptions, AveragingOptions, AdapterOptions, AuxiliaryOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus devices, engines, stages and fusion.

    An inherited option works or is refused; `fuse.config.inherited` lists those that cannot matter here. `max_steps` is
    the most updates, in place of `num_train_epochs` where `total_episodes` is not set either.

    Raises:
        ValueError: an option out of range, with the value, the rule and the remedy.
    """

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_devices", "actor_stages"),
        *("num_micro_batches", "engine_batch_size", "inference_batch_tokens", "activation_memory_bytes"),
        *("tensor_parallel_size", "generation_cache_bytes", "generation_tensor_parallel_size"),
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (
        *("trace_steps", "trace_limit", "max_grad_norm", "sigterm_grace_s", "num_sample_generations"),
    )
    POSITIVE: ClassVar[tuple[str, ...]] = (
        *("worker_timeout_s", "schedule_time_limit_s", "replan_drift", "reward_timeout_s"),
    )
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "migration_policy": ("adaptive", "threshold", "none"),
        "train_backend": ("transformers", "megatron"),
        "engine": ("transformers", "vllm"),
        "kv_transfer": ("object_store", "nixl"),
        "engines_sleep": ("auto", "on", "off"),
        "offload_training": ("auto", "on", "off"),
        "scoring": ("auto", "whole", "sharded"),
        "old_logprobs": ("auto", "engine", "trainer"),
        "reward_workers": ("thread", "process"),
        "long_prompts": ("error", "drop", "truncate"),
        "tail_training": ("auto", "off"),
    }

    MAX_RESPONSE_OPTION: ClassVar[str]
    """What users set `max_response_tokens` by."""
    PADDING_ENDS_RESPONSES: ClassVar[bool] = False
    """Whether a response counts only up to the first padding token that is sampled in it."""

    bf16: bool | None = option(  # type: ignore[assignment]  # None is replaced on construction
        None,
        "Compute in bfloat16 with fp32 weights. Default: on a GPU that supports it, not on a CPU. On CPUs it is for "
        "training and scoring; samples are generated in float32, for which alone there is native attention.",
    )

    num_devices: int | None = option(
        None, "GPUs, or CPU cores without one, to run on. Default: every GPU, or two cores."
    )
    ray_address: str | None = option(None, "Join this Ray cluster instead of starting a local one.")
    actor_stages: int | None = option(
        None,
        "Pipeline stages of the actor: a divisor of the devices, for data parallelism over the rest, or a multiple, "
        "for several stages per device. Default: as many as devices; without a critic 1, if the model fits.",
    )
    train_backend: Literal["transformers", "megatron"] = option(
        "transformers", "What stages are made of: the Hugging Face model's own layers, or megatron-core's."
    )
    tensor_parallel_size: int = option(1, "Devices that share each stage's matrices; needs train_backend='megatron'.")
    balance_stages: bool = option(
        True,
        "Cut models into stages, and run the critic in the direction, that measured times favour; else evenly, "
        "as in a run of one update.",
    )
    inter_stage_fusion: bool = option(
        True, "Score samples while others are generated, and move long ones together; else stage by stage."
    )
    migration_policy: Literal["adaptive", "threshold", "none"] = option(
        "adaptive",
        "Which samples move between engines: adaptive plans at every finish; threshold is RLHFuse's rule; none moves "
        "and scores nothing before all are generated.",
    )
    intra_stage_fusion: bool = option(
        True, "Train actor and critic at once in one fused schedule; else one after the other (1F1B)."
    )
    tail_training: Literal["auto", "off"] = option(
        "auto",
        "Train, on devices with nothing left to generate, what needs no sample that is still being generated: of the "
        "first optimizer step the critic's, or complete groups without one. Gradients stay what they are, to rounding. "
        "'auto': with inter_stage_fusion, where memory holds engines and training at once.",
    )
    tail_sharing: list[float] | None = option(
        None,
        "How many times as long decoding and training take while a device does both: with these, one that decodes a "
        "few last samples trains beside them where that pays. Default: 2 2 of a CPU core, where it never does.",
    )
    schedule_time_limit_s: float = option(10.0, "Most seconds to search for a fused schedule; few are needed anew.")
    replan_drift: float = option(
        0.3,
        "Plan again once a stage's share of the time is off the plan by more than this, 3 updates in a row (1 after "
        "the first plan, which rests on one update).",
    )
    activation_memory_bytes: int | None = option(
        None, "Most bytes of activations on a device in fused training. Default: what a GPU has free; no limit on CPUs."
    )
    regroup_micro_batches: bool | None = option(
        None,
        "Deal an optimizer step's samples into micro-batches of similar length, or of as many tokens where none are "
        "padded; every token keeps its weight in the loss, gradients and metrics stay, to rounding. Default: yes.",
    )
    num_micro_batches: int | None = option(
        None,
        "Micro-batches that an optimizer step's samples are dealt into, no fewer than per_device_train_batch_size "
        "makes; 1: those. Default: for pipelines as many as should train soonest, by measured times, else those.",
    )
    engine: Literal["transformers", "vllm"] = option(
        "transformers", "What generates: transformers, or vLLM where it is installed. Tokens are the same."
    )
    generation_tensor_parallel_size: int = option(
        1, "Devices of one host that share each engine's weights and cache; needs engine='vllm'."
    )
    engine_batch_size: int = option(64, "Samples that one engine decodes at once.")
    generation_cache_bytes: int | None = option(
        None,
        "Bytes of KV cache of each vLLM engine. Default: engine_batch_size of the longest prompts and responses, "
        "but at most a quarter of the device's memory.",
    )
    generation_cuda_graphs: bool = option(
        False,
        "Decode by captured CUDA graphs in the transformers engine on GPUs, which vLLM does by itself. Not run yet.",
    )
    engines_sleep: Literal["auto", "on", "off"] = option(
        "auto",
        "Engines free their weights and cache during training, and get both back with the new weights: auto where a "
        "GPU's memory does not hold all at once, or is not known.",
    )
    offload_training: Literal["auto", "on", "off"] = option(
        "auto",
        "What trains moves to host memory while samples are generated, which costs two copies an update: auto where a "
        "GPU's memory does not hold all at once, even while engines sleep during training.",
    )
    kv_transfer: Literal["object_store", "nixl"] = option(
        "object_store",
        "How the KV of samples that move goes from engine to engine: through Ray's object store in host memory, or by "
        "NIXL, where it is installed, from device to device.",
    )
    inference_batch_tokens: int | None = option(
        None,
        "Most tokens, padding included, in one inference micro-batch. Default: 16384 on GPUs, 2048 on CPUs, where more "
        "would leave the caches.",
    )
    scoring: Literal["auto", "whole", "sharded"] = option(
        "auto",
        "Models that score: 'whole' on every device, or 'sharded': every device has some of their layers, and samples "
        "flow through all devices; a critic is then scored through the stages that train. 'auto' is whole where that "
        "fits into memory.",
    )
    old_logprobs: Literal["auto", "engine", "trainer"] = option(
        "auto",
        "Log-probabilities of before the update, which ratios are to: those of the 'engine' that sampled, or computed "
        "anew by the 'trainer', at the cost of a forward. 'auto' is the engine's but where "
        "vllm_importance_sampling_correction needs both.",
    )
    worker_timeout_s: float = option(
        1800.0, "Seconds without a token, a score or a message after which a worker counts as lost."
    )
    sigterm_grace_s: float = option(
        25.0,
        "Seconds after SIGTERM in which the update must end for a checkpoint to be saved; else the run ends without. "
        "Stay below what your scheduler allows before it kills: often 30.",
    )
    stop_token: Literal["none", "eos", "model"] | None = option(
        None,
        "'eos' ends a response at the tokenizer's end-of-sequence token, 'model' there and at those of the model's "
        "generation configuration, which are often several; 'none' only at its greatest length. Default: as TRL has "
        "it, for `fuse train` 'model'.",
    )
    stop_token_id: int | None = option(None, "Token that ends a response; excludes stop_token.")
    num_sample_generations: int = option(
        10, "Times completions of the evaluation prompts are shown during training; 0 for never."
    )
    reward_workers: Literal["thread", "process"] = option(
        "thread",
        "What calls a reward function: threads of this process, or up to 4 processes, for functions that compute long "
        "or use signals.",
    )
    reward_timeout_s: float = option(
        3600.0, "Seconds after which a call of a reward function that has not returned is an error."
    )
    reward_error_score: float | None = option(
        None,
        "Score of a sample for which the reward function raises or does not return; rewards/errors counts them. "
        "Default: it ends the run.",
    )
    long_prompts: Literal["error", "drop", "truncate"] = option(
        "error",
        "What is done with prompts that leave no room for a response in the policy's context: refuse the dataset, "
        "leave them out, or keep their ends.",
    )
    trace_steps: int = option(
        1, "Updates between two traces written to output_dir/traces, which keeps the last trace_limit; 0 for none."
    )
    trace_limit: int = option(
        100, "Most traces kept in output_dir/traces, of which the oldest are deleted; 0 keeps all."
    )

    def __post_init__(self) -> None:
        if self.fp16:
            raise ValueError("fp16=True is not supported (it needs loss scaling): set bf16=True or neither")
        self._check_numbers()
        check_inherited(self)
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = has_gpu and torch.cuda.is_bf16_supported()
        if self.bf16 and not has_gpu:
            self.use_cpu = True  # transformers allows bfloat16 on CPUs where they are asked for by name
            warn_of_bfloat16()
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.output_dir = os.path.abspath(str(self.output_dir))  # workers have other current directories
        self._check_ranges()
        self._check_choices()
        self._check_combinations()

    def _check_numbers(self) -> None:
        """Whether every number is one that a range can be asked of, and that 64 bits hold."""
        for name, value in ((each.name, getattr(self, each.name)) for each in fields(self)):
            if isinstance(value, float) and not (math.isfinite(value) or (name == "max_grad_norm" and value > 0)):
                raise ValueError(f"{name}={value} is not a finite number")
            if isinstance(value, int) and abs(value) >= _MOST_INTEGER:
                raise ValueError(f"{name} has {len(str(abs(value)))} digits: give a number that 64 bits hold")
        if isinstance(self.seed, int) and not 0 <= self.seed < _NUM_SEEDS:
            raise ValueError(f"seed={self.seed} must be from 0 to {_NUM_SEEDS - 1}")

    def _check_ranges(self) -> None:
        for name in self.AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in self.NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
        for name in self.POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1, or -1 for no limit")

    def _check_choices(self) -> None:
        for name, choices in self.CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r} is unknown: use {either(choices)}")

    def _check_combinations(self) -> None:
        if self.stop_token == "none":
            self.stop_token = None
        if self.stop_token is not None and self.stop_token_id is not None:
            raise ValueError("stop_token and stop_token_id are both set: set one of them")
        if self.stop_token not in (None, "eos", "model"):
            raise ValueError(
                f"stop_token={self.stop_token!r} is unknown: use 'none', 'eos' or 'model', or stop_token_id for "
                f"another token"
            )
        if self.tensor_parallel_size > 1 and self.train_backend != "megatron":
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} with train_backend='transformers', whose stages "
                f"share no matrices: set train_backend='megatron', or leave it at 1"
            )
        cache_bytes, cuda_graphs = self.generation_cache_bytes, self.generation_cuda_graphs
        self.check_engine_options(self.engine, self.accelerator, cache_bytes=cache_bytes, cuda_graphs=cuda_graphs)
        check_optimizer(self)
        tail_sharing(self.tail_sharing, self.accelerator)
        self.check_averaging()
        self.check_auxiliary()

    @property
    def accelerator(self) -> Literal["cpu", "cuda"]:
        """What a device is: a GPU where there is one and `use_cpu` is not set, else a CPU core."""
        return "cuda" if torch.cuda.is_available() and not self.use_cpu else "cpu"

    @property
    def regroups(self) -> bool:
        """Whether micro-batches are regrouped."""
        return self.regroup_micro_batches is not False

    @property
    def sampling_temperature(self) -> float:
        """What logits are divided by, in sampling and in every log-probability: never zero."""
        raise NotImplementedError

    @property
    def sampling_filters(self) -> Mapping[str, Any]:
        """Which tokens are not drawn, as `SamplingParams` has it."""
        return {}

    @property
    def max_response_tokens(self) -> int:
        """Most tokens of a response."""
        raise NotImplementedError

    @property
    def recomputes_logprobs(self) -> bool:
        """Whether the trainer computes old log-probabilities before each update."""
        return self.old_logprobs == "trainer"

    @property
    def trains_early(self) -> bool:
        """Whether what can be is trained before all samples are scored."""
        return self.tail_training == "auto" and self.inter_stage_fusion and not self.recomputes_logprobs

    @property
    def max_inference_samples(self) -> int:
        """Most samples in one inference micro-batch."""
        return 64

    @property
    def mixing(self) -> Mixing | None:
        """How a model that only scores follows the policy; None where none does."""
        return None

    @property
    def own_learning_rates(self) -> Mapping[str, float]:
        """Of the roles that have another than `learning_rate`."""
        return {}

    @property
    def stages(self) -> Mapping[str, int | None]:
        """Pipeline stages by role; None for as many as devices."""
        return {"actor": self.actor_stages}
