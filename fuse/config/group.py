"""GroupConfig: what runs without a critic have in common, which compare the responses to one prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from fuse.config.option import option
from fuse.config.run_length import RunLength
from fuse.config.sample_choice import SampleChoiceConfig
from fuse.driver.mixing import Mixing

_NO_EFFECT = "Accepted for compatibility; no effect."
_REFUSED = "Accepted for compatibility; must stay unset."

_VLLM = "leave it out: set engine='vllm', num_devices and generation_cache_bytes"
_ENGINES = "leave it out: set engine and engine_batch_size"


@dataclass
class GroupConfig(SampleChoiceConfig):
    """Arguments of `SampleChoiceConfig`, and those that GRPO and RLOO share, with TRL's names and defaults (trl 1.12).

    Two defaults are not TRL's: `gradient_checkpointing` is off, and `bf16` is true on a GPU that has it alone.

    An update is a rollout and the optimizer steps on its samples, as TRL takes them: `generation_batch_size` samples,
    cut into `steps_per_generation` micro-batches, used `num_iterations` times, with a step after every
    `gradient_accumulation_steps` of them. A step counts as one in `max_steps`, `save_steps` and the learning rate.
    """

    AT_LEAST_ONE: ClassVar[tuple[str, ...]] = (
        *SampleChoiceConfig.AT_LEAST_ONE,
        *("num_generations", "num_generations_eval", "max_completion_length", "generation_batch_size"),
        *("steps_per_generation", "num_iterations", "ref_model_sync_steps"),
    )
    NOT_NEGATIVE: ClassVar[tuple[str, ...]] = (*SampleChoiceConfig.NOT_NEGATIVE, "beta")
    POSITIVE: ClassVar[tuple[str, ...]] = (*SampleChoiceConfig.POSITIVE, "epsilon", "temperature")
    MAX_RESPONSE_OPTION: ClassVar[str] = "max_completion_length"
    UNSUPPORTED: ClassVar[Mapping[str, str]] = {
        "generation_kwargs": "leave it out: set temperature, top_p, top_k, min_p and repetition_penalty",
        "cache_implementation": _ENGINES,
        "use_transformers_continuous_batching": _ENGINES,
        "transformers_continuous_batching_config": _ENGINES,
        "use_transformers_paged": _ENGINES,
        "vllm_model_impl": _VLLM,
        "vllm_enable_sleep_mode": "leave it out: engines_sleep is for every engine",
        "vllm_structured_outputs_regex": "leave it out: every token is drawn from the policy",
        "vllm_server_base_url": _VLLM,
        "vllm_gpu_memory_utilization": _VLLM,
        "vllm_max_model_length": "leave it out: the longest prompt and response are made room for",
        "vllm_tensor_parallel_size": "leave it out: set engine='vllm' and generation_tensor_parallel_size",
    }
    """Options of TRL that are refused but for their defaults, and what to do instead."""

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
    generation_batch_size: int | None = option(
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
    sync_ref_model: bool = option(False, "Have the reference follow the policy: every ref_model_sync_steps it moves.")
    ref_model_mixup_alpha: float = option(
        0.6, "The policy's share in the reference's new weights; the rest is of its own. With sync_ref_model."
    )
    ref_model_sync_steps: int = option(512, "Optimizer steps between two moves of the reference. With sync_ref_model.")
    epsilon: float = option(0.2, "How far below 1 a ratio may move the policy, and above without epsilon_high.")
    epsilon_high: float | None = option(None, "How far above 1 a ratio may move the policy.")
    reward_weights: list[float] | None = option(None, "Of the reward functions, in their order. Default: 1 each.")
    mask_truncated_completions: bool = option(False, "Learn nothing from responses that reach their greatest length.")

    bidirectional: bool | None = option(
        None,
        "Train two replicas of the policy at once, through pipelines in opposite directions, each on half of the "
        "micro-batches, so that each fills the other's bubbles; both are held in memory, with gradients and moments. "
        "Default: where the policy is trained through a pipeline, memory allows, and measured times say that it is "
        "faster (which needs balance_stages and intra_stage_fusion); else plain 1F1B.",
    )

    forward_only: bool | None = option(
        None,
        "Compute log-probabilities that the loss alone needs within the optimizer steps, by forwards that fill the "
        "bubbles of training, in place of before them: with old_logprobs='trainer' the policy's own, and with "
        "scoring='sharded' a reference's that is in no reward. Default: where the policy is trained through a "
        "pipeline and plans say that it is faster; but a reference's not with inter_stage_fusion, by which it scores "
        "while samples are generated.",
    )
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "For from_pretrained, where models are given by name."
    )
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

    @property
    def least_generations(self) -> int:
        """Responses to a prompt that the algorithm needs."""
        return 2

    @property
    def num_trained(self) -> int:
        """Of the responses to a prompt, so many are trained on."""
        return self.num_generations

    @property
    def num_together(self) -> int:
        """Samples that are side by side in what is trained on, and of which a micro-batch has all or none."""
        return 1

    @property
    def needs_reference(self) -> bool:
        """Whether the model that the policy began as is kept."""
        return self.beta != 0

    @property
    def sampling_temperature(self) -> float:
        return self.temperature

    @property
    def sampling_filters(self) -> Mapping[str, Any]:
        return {name: getattr(self, name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")}

    @property
    def max_response_tokens(self) -> int:
        return self.max_completion_length

    @property
    def rollout_size(self) -> int:
        """Samples of a rollout."""
        assert self.generation_batch_size is not None, "filled in on construction"
        return self.generation_batch_size

    @property
    def trained_size(self) -> int:
        """Samples of a rollout that are trained on."""
        return self.rollout_size // self.num_generations * self.num_trained

    @property
    def micro_batches_per_rollout(self) -> int:
        return self.trained_size // self.per_device_train_batch_size

    @property
    def uses_per_rollout(self) -> int:
        """Micro-batches that are trained on, each as often as it is."""
        return self.micro_batches_per_rollout * self.num_iterations

    @property
    def is_on_policy(self) -> bool:
        """Whether every sample is trained on by the weights that generated it."""
        return self.gradient_accumulation_steps % self.uses_per_rollout == 0

    @property
    def rollouts_per_update(self) -> int:
        """Rollouts with the same weights: of which one optimizer step consists, where it has several."""
        return max(1, self.gradient_accumulation_steps // self.uses_per_rollout)

    @property
    def mixing(self) -> Mixing | None:
        if not self.sync_ref_model:
            return None
        return Mixing(role="reference", alpha=self.ref_model_mixup_alpha, every_steps=self.ref_model_sync_steps)

    def run_length(self, num_rows: int) -> RunLength:
        """How much a run on so many prompts trains."""
        micro_batches = self.rollouts_per_update * self.uses_per_rollout
        steps_per_update = micro_batches // self.gradient_accumulation_steps
        prompts_per_update = self.rollouts_per_update * self.rollout_size // self.num_generations
        updates_per_pass = num_rows // prompts_per_update
        if self.max_steps > 0:
            num_steps = self.max_steps
        else:
            num_steps = math.ceil(self.num_train_epochs * updates_per_pass * steps_per_update)
        return RunLength(
            prompts_per_update=prompts_per_update,
            num_steps=num_steps,
            optimizer_steps_per_update=steps_per_update,
            micro_batches_per_step=self.gradient_accumulation_steps,
            steps_per_update=steps_per_update,
            samples_per_prompt=self.num_generations,
        )

    def __post_init__(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name, remedy in self.UNSUPPORTED.items():
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{name}={value!r} is not supported: {remedy}")
        self.chat_template_kwargs = _json_object("chat_template_kwargs", self.chat_template_kwargs)
        self.model_init_kwargs = _json_object("model_init_kwargs", self.model_init_kwargs)
        if self.use_vllm:
            self.engine = "vllm"
        super().__post_init__()

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.vllm_mode != "colocate":
            raise ValueError(
                f"vllm_mode={self.vllm_mode!r} is not supported: engines are on num_devices, set 'colocate'"
            )
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} must lie between 0 and 1, or be 1 for the policy "
                f"itself"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie between 0 and 1, or be 1 for every token")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative; 0 is for every token")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie between 0 and 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be positive; 1 is for none")

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.sync_ref_model and not self.needs_reference:
            raise ValueError(
                "sync_ref_model=True with beta=0.0, for which there is no reference model: set beta, or leave it out"
            )
        if self.num_generations < self.least_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: responses are compared with others to their prompt, so there "
                f"must be at least {self.least_generations}"
            )
        if self.num_generations < 2 and self.min_reward_variance is not None:
            raise ValueError(
                f"min_reward_variance={self.min_reward_variance} with num_generations={self.num_generations}: one "
                f"reward has no variance; raise num_generations, or leave it out"
            )
        self._fill_rollout_size()
        size, uses = self.rollout_size, self.uses_per_rollout
        if size % self.num_generations:
            raise ValueError(
                f"generation_batch_size={size} (per_device_train_batch_size x steps_per_generation) is no multiple of "
                f"num_generations={self.num_generations}: rollouts hold whole groups, so change one of these"
            )
        if uses % self.gradient_accumulation_steps and self.gradient_accumulation_steps % uses:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} neither divides nor is a multiple of "
                f"the {uses} micro-batches of a rollout (steps_per_generation x num_iterations), so weights would "
                f"change in the middle of one: change one of these"
            )

    def _fill_rollout_size(self) -> None:
        """From micro-batches of what is trained on to the samples of a rollout, or back."""
        micro_batch = self.per_device_train_batch_size * self.num_generations  # of samples, times num_trained
        if self.generation_batch_size is None:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            self.generation_batch_size = micro_batch * self.steps_per_generation // self.num_trained
            return
        steps, rest = divmod(self.generation_batch_size * self.num_trained, micro_batch)
        if self.steps_per_generation is None:
            if rest:
                is_all = self.num_trained == self.num_generations
                of_each = "" if is_all else f" x {self.num_generations} / {self.num_trained}"
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size} is no multiple of "
                    f"per_device_train_batch_size={self.per_device_train_batch_size}{of_each}: choose one"
                )
            self.steps_per_generation = steps
        elif rest or steps != self.steps_per_generation:
            raise ValueError(
                f"generation_batch_size={self.generation_batch_size} and steps_per_generation="
                f"{self.steps_per_generation} are both set, and do not agree: set one of them"
            )


def _json_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Raises: ValueError for text that is no JSON object."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} is not JSON ({error}): give an object, e.g. '{{\"key\": 1}}'") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{name}={value!r} is no JSON object: give e.g. '{{\"key\": 1}}'")
    return parsed
