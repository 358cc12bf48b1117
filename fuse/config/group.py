"""GroupConfig: what runs without a critic have in common, which compare the responses to one prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from fuse.config.run import RunConfig, option
from fuse.config.run_length import RunLength

_NO_EFFECT = "Accepted for compatibility; no effect."
_REFUSED = "Accepted for compatibility; must stay unset."

_VLLM = "leave it out: set engine='vllm', num_devices and generation_cache_bytes"
_ENGINES = "leave it out: set engine and generation_batch_size"


@dataclass
class GroupConfig(RunConfig):
    """Arguments of `RunConfig`, and those that GRPO and RLOO share, with TRL's names and defaults (trl 1.12).

    Two defaults are not TRL's: `gradient_checkpointing` is off, and `bf16` is true on a GPU that has it alone.

    An update is a rollout and the optimizer steps on its samples, as TRL takes them: `generation_batch_size` samples,
    cut into `steps_per_generation` micro-batches, used `num_iterations` times, with a step after every
    `gradient_accumulation_steps` of them. A step counts as one in `max_steps`, `save_steps` and the learning rate.
    """

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        *RunConfig.AT_LEAST_ONE,
        *("num_generations", "num_generations_eval", "max_completion_length", "generation_batch_size"),
        *("steps_per_generation", "num_iterations"),
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*RunConfig.NOT_NEGATIVE, "beta", "temperature")
    POSITIVE: ClassVar[tuple[str, ...]] = (*RunConfig.POSITIVE, "epsilon")
    MAX_RESPONSE_OPTION: ClassVar[str] = "max_completion_length"
    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        "generation_kwargs": "leave it out: set temperature, top_p, top_k, min_p and repetition_penalty",
        "cache_implementation": _ENGINES,
        "use_transformers_continuous_batching": _ENGINES,
        "transformers_continuous_batching_config": _ENGINES,
        "use_transformers_paged": _ENGINES,
        "vllm_model_impl": _VLLM,
        "vllm_enable_sleep_mode": _VLLM,
        "vllm_structured_outputs_regex": "leave it out: every token is drawn from the policy",
        "vllm_server_base_url": _VLLM,
        "vllm_gpu_memory_utilization": _VLLM,
        "vllm_max_model_length": "leave it out: the longest prompt and response are made room for",
        "vllm_tensor_parallel_size": _VLLM,
        "sync_ref_model": "leave it out: the reference stays as it was",
    }
    """Options of TRL that are refused but for their defaults, and what to do instead."""
    MIN_GENERATIONS: ClassVar[int] = 2

    learning_rate: float = option(1e-6, "The initial learning rate for AdamW.")
    logging_steps: float = option(10, "Steps between two logs for callbacks that ask.")
    stop_token: Literal["none", "eos", "model"] | None = option(
        "eos",
        "'eos' ends a response at the tokenizer's end-of-sequence token, 'model' there and at those of the model's "
        "generation configuration, which are often several; 'none' only at max_completion_length. Default: 'eos', as "
        "TRL has it, for `fuse train` 'model'.",
    )

    num_generations: int = option(8, "Responses to every prompt, which are compared with one another.")
    num_generations_eval: int | None = option(None, "Responses to every evaluation prompt. Default: num_generations.")
    max_completion_length: int = option(512, "Most tokens of a response.")
    generation_batch_size: int | None = option(  # type: ignore[assignment]
        None, "Samples of a rollout. Default: per_device_train_batch_size times steps_per_generation."
    )
    steps_per_generation: int | None = option(
        None, "Micro-batches that a rollout is cut into. Default: gradient_accumulation_steps."
    )
    num_iterations: int = option(1, "Times that a rollout is trained on.")
    shuffle_dataset: bool = option(True, "Draw prompts at random; else in the dataset's order.")
    temperature: float = option(1.0, "Sampling temperature.")
    top_p: float = option(1.0, "Sample from the likeliest tokens with so much probability together.")
    top_k: int = option(0, "Sample from so many of the likeliest tokens; 0 for all.")
    min_p: float | None = option(None, "Sample from tokens with so much of the likeliest one's probability.")
    repetition_penalty: float = option(1.0, "Above 1, tokens of the prompt and the response become less likely.")
    chat_template_kwargs: dict[str, Any] | str | None = option(None, "For the chat template, as a JSON object.")

    beta: float = option(0.0, "Weight of the KL penalty. 0: there is no reference model.")
    epsilon: float = option(0.2, "How far below 1 a ratio may move the policy, and above without epsilon_high.")
    epsilon_high: float | None = option(None, "How far above 1 a ratio may move the policy.")
    reward_weights: list[float] | None = option(None, "Of the reward functions, in their order. Default: 1 each.")
    mask_truncated_completions: bool = option(False, "Learn nothing from responses that reach their greatest length.")
    max_decoded_samples: int = option(64, "Samples that one engine decodes at once.")

    model_init_kwargs: dict[str, Any] | str | None = option(None, "For from_pretrained, where models are given by name.")
    trust_remote_code: bool = option(False, "Whether models that are given by name may bring code of their own.")
    log_completions: bool = option(False, "Print a table of completions after every update.")
    num_completions_to_print: int | None = option(None, "Rows of that table. Default: all.")

    use_vllm: bool = option(False, "The same as engine='vllm'.")
    vllm_mode: str = option("colocate", "The only one here: engines share the devices with training.")
    router_aux_loss_coef: float = option(0.001, "Of mixtures of experts, which are not supported.")
    disable_dropout: bool = option(False, _NO_EFFECT)
    ds3_gather_for_generation: bool = option(True, _NO_EFFECT)
    pad_to_multiple_of: int | None = option(None, _NO_EFFECT)
    log_multimodal: bool = option(True, _NO_EFFECT)
    log_unique_prompts: bool = option(False, _NO_EFFECT)
    vllm_server_host: str = option("0.0.0.0", _NO_EFFECT)
    vllm_server_port: int = option(8000, _NO_EFFECT)
    vllm_server_timeout: float = option(240.0, _NO_EFFECT)
    vllm_group_port: int = option(51216, _NO_EFFECT)
    ref_model_mixup_alpha: float = option(0.6, _NO_EFFECT)
    ref_model_sync_steps: int = option(512, _NO_EFFECT)
    generation_kwargs: dict[str, Any] | str | None = option(None, _REFUSED)
    cache_implementation: str | None = option(None, _REFUSED)
    use_transformers_continuous_batching: bool = option(False, _REFUSED)
    transformers_continuous_batching_config: dict[str, Any] | str | None = option(None, _REFUSED)
    use_transformers_paged: bool = option(False, _REFUSED)
    vllm_model_impl: str = option("vllm", _REFUSED)
    vllm_enable_sleep_mode: bool = option(False, _REFUSED)
    vllm_structured_outputs_regex: str | None = option(None, _REFUSED)
    vllm_server_base_url: str | None = option(None, _REFUSED)
    vllm_gpu_memory_utilization: float = option(0.3, _REFUSED)
    vllm_max_model_length: int | None = option(None, _REFUSED)
    vllm_tensor_parallel_size: int = option(1, _REFUSED)
    sync_ref_model: bool = option(False, _REFUSED)
