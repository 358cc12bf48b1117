"""What a resumed run does otherwise than the run that wrote the checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from fuse.config.inherited import CANNOT_MATTER
from fuse.config.run import RunConfig

MAY_DIFFER = frozenset(
    {
        *CANNOT_MATTER,
        # Where things are written, and who hears of them.
        *("output_dir", "run_name", "report_to", "project", "disable_tqdm", "resume_from_checkpoint"),
        "restore_callback_states_from_checkpoint",
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "trace_steps", "trace_limit"),
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
        *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_revision"),
        *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "num_sample_generations"),
        # Where and when things are computed, on which results do not depend.
        *("num_devices", "use_cpu", "ray_address", "actor_stages", "critic_stages", "balance_stages"),
        *("train_backend", "tensor_parallel_size", "engine", "engine_batch_size", "generation_cache_bytes"),
        *("generation_cuda_graphs", "speculation"),
        *("engines_sleep", "offload_training", "scoring", "regroup_micro_batches", "num_micro_batches"),
        "generation_tensor_parallel_size",
        *("inter_stage_fusion", "migration_policy", "kv_transfer", "inference_batch_tokens"),
        *("tail_training", "tail_sharing", "intra_stage_fusion", "schedule_time_limit_s", "replan_drift"),
        "activation_memory_bytes",
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "local_rollout_forward_batch_size"),
        *("worker_timeout_s", "sigterm_grace_s", "reward_workers", "reward_timeout_s"),
        # Filled in by the trainer, or for scripts.
        *("world_size", "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size"),
        *("local_mini_batch_size", "mini_batch_size"),
        *("sft_model_path", "reward_model_path", "dataset_num_proc", "ds3_gather_for_generation"),
    }
)
"""Options that do not change what is learned."""


def kept_options(config: RunConfig) -> dict[str, Any]:
    """The options that change what is learned, as JSON has them."""
    names = [field.name for field in dataclasses.fields(config) if field.init and field.name not in MAY_DIFFER]
    kept: dict[str, Any] = json.loads(json.dumps({name: getattr(config, name) for name in names}, default=str))
    return kept


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`learning_rate 3e-06 -> 1e-05` of every option that both know and that has changed."""
    return [f"{name} {before[name]} -> {value}" for name, value in now.items() if before.get(name, value) != value]
