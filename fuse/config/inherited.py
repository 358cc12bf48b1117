"""The options of `transformers.TrainingArguments`: which work, which cannot matter here, which are refused.

An option in neither WORKS nor CANNOT_MATTER is refused wherever it differs from its default; REMEDIES say what to do
instead. So is one that a later transformers adds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

WORKS = frozenset(
    {
        *("output_dir", "run_name", "report_to", "project", "disable_tqdm"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("bf16", "fp16", "gradient_checkpointing", "gradient_checkpointing_kwargs", "use_cpu", "seed"),
        *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size"),
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "resume_from_checkpoint"),
        "restore_callback_states_from_checkpoint",
        *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_revision"),
    }
)
"""Those of which single values are refused with a line of their own included."""

CANNOT_MATTER: Mapping[str, str] = {
    "average_tokens_across_devices": "a batch's losses are averaged over its tokens wherever they are computed",
    "use_cache": "generation always keeps keys and values, training never",
    **dict.fromkeys(("logging_strategy", "logging_steps", "logging_first_step"), "every update is logged"),
    "logging_nan_inf_filter": "logged values are never filtered",
    **dict.fromkeys(("log_on_each_node", "log_level_replica", "hub_always_push"), "one process logs, saves and pushes"),
    **dict.fromkeys(
        ("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        "evaluation prompts are completed and shown; there are no predictions to gather",
    ),
    **dict.fromkeys(
        (
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
            *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order"),
        ),
        "an update reads one batch of prompts, which takes next to no time",
    ),
    "dataloader_drop_last": "updates have one size, and evaluation uses every prompt",
    "remove_unused_columns": "every column is kept, for reward functions",
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        "there is no DistributedDataParallel",
    ),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "they are for scripts, as in transformers"),
}
"""Why these are accepted without effect."""

_SHARDING = "set num_devices, actor_stages and critic_stages, which spread models over devices"
_NO_BEST = "compare checkpoints by the log, e.g. objective/scores"
_COMPILING = "leave it out: workers run the models' own code"
_FULL_EVAL = "set bf16=True, which scoring follows"
_ONE_ADAMW = "leave it out: every weight is trained by one AdamW"
_CALLABLE = "leave it out: there is no compute_metrics"

REMEDIES: Mapping[str, str] = {
    "optim_args": _ONE_ADAMW,
    "optim_target_modules": _ONE_ADAMW,
    "label_smoothing_factor": "leave it out: PPO's losses have no labels to smooth",
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "tf32": "leave it out, or set bf16=True for faster matrix products",
    "torch_compile": _COMPILING,
    "torch_compile_backend": _COMPILING,
    "torch_compile_mode": _COMPILING,
    "use_liger_kernel": _COMPILING,
    "liger_kernel_config": _COMPILING,
    "neftune_noise_alpha": "leave it out: noise would make sampler and trainer differ",
    "torch_empty_cache_steps": "set activation_memory_bytes to bound what training holds",
    "auto_find_batch_size": "set per_device_train_batch_size: results depend on it",
    "include_num_input_tokens_seen": "count them in a callback",
    "log_level": "call transformers.logging.set_verbosity, or logging.getLogger('fuse').setLevel",
    "eval_on_start": "call trainer.generate_completions() before trainer.train()",
    "include_for_metrics": _CALLABLE,
    "batch_eval_metrics": _CALLABLE,
    "save_on_each_node": "use an output_dir that every node sees",
    "enable_jit_checkpoint": "set save_strategy='steps' and save_steps: the last checkpoint survives any signal",
    "load_best_model_at_end": _NO_BEST,
    "metric_for_best_model": _NO_BEST,
    "greater_is_better": _NO_BEST,
    "ignore_data_skip": "leave it out: a resumed run continues the order of prompts",
    "full_determinism": "set seed, on which tokens depend whatever their batch",
    "data_seed": "set seed, which orders the prompts too",
    "accelerator_config": _SHARDING,
    "parallelism_config": _SHARDING,
    "label_names": "leave it out: there are no labels",
    "train_sampling_strategy": "leave it out: prompts are drawn at random, and micro-batches are grouped by length",
    "length_column_name": "leave it out: lengths are counted",
    "ddp_backend": "leave it out: workers talk over gloo on CPUs and NCCL on GPUs",
    "ddp_timeout": "set worker_timeout_s",
    "fsdp": _SHARDING,
    "fsdp_config": _SHARDING,
    "deepspeed": _SHARDING,
    "debug": "leave it out: output_dir/traces show what every device did",
    "skip_memory_metrics": "measure the workers from outside; trainer.process_ids names them",
    "local_rank": "start one process, without torchrun: it starts the workers",
}


REFUSED_VALUES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "save_strategy": ((SaveStrategy.EPOCH, SaveStrategy.BEST), "set save_strategy='steps' and save_steps"),
    "eval_strategy": ((IntervalStrategy.EPOCH,), "set eval_strategy='steps' and eval_steps"),
    "lr_scheduler_type": (
        (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY),
        "it follows an evaluation loss, which PPO has not: choose another, e.g. 'linear' or 'cosine'",
    ),
    "hub_strategy": (
        (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS),
        "checkpoints are not uploaded: set hub_strategy='end'",
    ),
}
"""Values of options that work, and what to do instead."""


def check_inherited(config: TrainingArguments) -> None:
    """Before `TrainingArguments` acts on them.

    Raises:
        ValueError: an option, or a value of one, that would have no effect, with what to set instead.
    """
    names = {field.name for field in dataclasses.fields(TrainingArguments)} - WORKS - CANNOT_MATTER.keys()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in names and not _is_default(value, field):
            remedy = REMEDIES.get(field.name, "leave it out")
            raise ValueError(f"{field.name}={value!r} is not supported: {remedy}")
    _check_values(config)


def _is_default(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Also in the forms that `TrainingArguments` and its parser give to defaults, so that these pass."""
    default = None if field.default is dataclasses.MISSING else field.default
    is_off = (not value and not default) or (value is False and default == "no")
    return value == default or is_off or value == AcceleratorConfig()


def _check_values(config: TrainingArguments) -> None:
    for name, (values, remedy) in REFUSED_VALUES.items():
        if (value := getattr(config, name)) in values:
            raise ValueError(f"{name}={str(getattr(value, 'value', value))!r} is not supported: {remedy}")


def check_optimizer(config: TrainingArguments) -> None:
    """Raises: ValueError for an optimizer, or a kind of gradient checkpointing, that is not supported."""
    if config.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
        raise ValueError(f"optim={config.optim} is not supported: use adamw_torch")
    if config.gradient_checkpointing_kwargs not in (None, {}, {"use_reentrant": False}):
        raise ValueError(
            f"gradient_checkpointing_kwargs={config.gradient_checkpointing_kwargs!r} is not supported: leave it out, "
            f"or set {{'use_reentrant': False}}, which is what is done"
        )
