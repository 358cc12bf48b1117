"""From what users set to the frozen settings of each component."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PretrainedConfig

from fuse.algorithms.algorithm import Algorithm
from fuse.config.generation import check_generation
from fuse.config.prompt_tokens import PromptTokens
from fuse.config.run import RunConfig
from fuse.config.run_length import RunLength
from fuse.config.tail_sharing import tail_sharing
from fuse.driver.engine_choice import EngineFactory, choose_engine
from fuse.driver.fleet_settings import FleetSettings
from fuse.driver.kv_choice import choose_kv_transfer
from fuse.driver.model_size import kv_values
from fuse.engines.limits import num_positions
from fuse.interstage.migration import EngineLimits
from fuse.interstage.rollout_planner import RolloutSettings
from fuse.intrastage.opposite import can_have_opposites, with_opposites
from fuse.intrastage.optimizer import AdamWConfig
from fuse.intrastage.placement import Replica, place, share_ranks
from fuse.intrastage.plan_settings import PlanSettings
from fuse.roles import GENERATING
from fuse.sample import SpecialTokens
from fuse.training.late_scores import OLD_LOGPROBS, REFERENCE_LOGPROBS
from fuse.training.layer_costs import TypicalBatch
from fuse.training.layout import Layout
from fuse.training.rank import TrainingSettings
from fuse.training.scoring import MicroBatchLimit, ScoringSettings

_UNBOUNDED = 1 << 30
_INFERENCE_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def fleet_settings(
    config: RunConfig,
    algorithm: Algorithm,
    length: RunLength,
    layout: Layout,
    special: SpecialTokens,
    prompts: PromptTokens,
    actor: PretrainedConfig,
    *,
    whole_replicas: bool = False,
    bidirectional: bool | None = False,
    forward_only: bool | None = False,
) -> FleetSettings:
    """What `config` asks for, with prompts of so many tokens, for an actor of this configuration.

    whole_replicas: where stages are not asked for, every device trains all of a model on its share of the samples.
    bidirectional: the one model that trains has opposite replicas; None: where that should be faster.
    forward_only: what the loss alone needs is scored within training; None: where that should be faster.

    Raises:
        ValueError: stages or shares of matrices that do not fit the devices, or an engine or a KV transfer that is
            not installed, or shares of an engine that it or the actor cannot be cut into, or a number of micro-batches
            where these are not dealt.
    """
    count = num_devices(config)
    num_ranks, rest = divmod(count, config.tensor_parallel_size)
    if rest:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} does not divide num_devices={count}: choose a divisor"
        )
    check_generation(config, count, actor)
    units = algorithm.units if config.regroups else {}
    if config.num_micro_batches is not None and not units:
        raise ValueError(
            f"num_micro_batches={config.num_micro_batches}, but micro-batches are trained as they are drawn, for "
            "regroup_micro_batches=False, trl_quirks=True or top_entropy_quantile below 1: leave one of them out"
        )
    inference_batch_tokens = config.inference_batch_tokens or _INFERENCE_BATCH_TOKENS[config.accelerator]
    placement = tuple(
        replica
        for index, role in enumerate(algorithm.losses)
        for replica in place(
            role, num_ranks, config.stages[role] or (1 if whole_replicas else num_ranks), reverse=index % 2 == 1
        )
    )
    placement, alternative = opposites(config, placement, length.micro_batches_per_step, bidirectional)
    late = late_columns(config, algorithm, placement, forward_only)
    shares = any(share_ranks(one) for one in (placement, alternative) if one)
    is_fused = config.intra_stage_fusion and (shares or bool(late))
    training = TrainingSettings(
        backend=config.train_backend,
        split_backward=is_fused,
        tensor_parallel_size=config.tensor_parallel_size,
        losses=algorithm.losses,
        loss_normalization=algorithm.loss_normalization,
        units=units,
        least_micro_batches=config.num_micro_batches or 1,
        targets=algorithm.targets,
        layout=layout,
        adamw=AdamWConfig(
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm if layout.clips_gradients else 0.0,
        ),
        average_decays={} if config.ema_decay is None else {GENERATING: config.ema_decay},
        autocast=torch.bfloat16 if config.bf16 and layout.autocasts else None,
        gradient_checkpointing=config.gradient_checkpointing,
        timeout_s=config.worker_timeout_s,
    )
    # On CPUs attention over the cache is native in float32 alone.
    generation_type = training.autocast if config.accelerator == "cuda" else None
    return FleetSettings(
        num_devices=count,
        accelerator=config.accelerator,
        ray_address=config.ray_address,
        pad_token_id=special.pad if config.PADDING_ENDS_RESPONSES else None,
        engine=engine(
            config,
            generation_type,
            max_context=prompts.context(config.max_response_tokens, actor),
            num_tokens=special.num_tokens,
        ),
        generation_dtype=generation_type or torch.float32,
        kv_transfer=choose_kv_transfer(config.kv_transfer, config.accelerator, is_local=config.ray_address is None),
        scoring=ScoringSettings(
            temperature=config.sampling_temperature,
            limit=MicroBatchLimit(max_samples=config.max_inference_samples, max_tokens=inference_batch_tokens),
            autocast=training.autocast,
            num_tokens=special.num_tokens,
            is_sharded=config.scoring == "sharded",
        ),
        training=training,
        mixing=config.mixing,
        late=late,
        output_dir=Path(str(config.output_dir)),
        exported="merged" if config.engine == "vllm" else "trained",
        engine_devices=config.generation_tensor_parallel_size,
        tail_sharing=tail_sharing(config.tail_sharing, config.accelerator),
        placement=placement,
        alternative=alternative,
        micro_batches_per_step=length.micro_batches_per_step,
        balance=TypicalBatch(config.per_device_train_batch_size, prompts.typical, config.max_response_tokens)
        if config.balance_stages and any(len(replica.ranks) > 1 for replica in placement)
        else None,
        plan=PlanSettings(
            fused=is_fused,
            time_limit_s=config.schedule_time_limit_s,
            num_workers=min(8, len(os.sched_getaffinity(0))),
            num_updates=length.num_updates,
            steps_per_update=length.optimizer_steps_per_update,
            memory_limit_bytes=config.activation_memory_bytes,
            replan_drift=config.replan_drift,
            directory=Path(str(config.output_dir)) / "plan",
            chooses_number=bool(units)
            and config.num_micro_batches is None
            and any(len(set(replica.ranks)) > 1 for replica in (*placement, *(alternative or ()))),
            forces_scorers=forward_only is True,
        ),
        rollout=RolloutSettings(
            policy=config.migration_policy,
            num_devices=count // config.generation_tensor_parallel_size,
            engine_devices=config.generation_tensor_parallel_size,
            limits=_engine_limits(config, actor),
            kv_bytes_per_token=_kv_bytes_per_token(actor, generation_type),
            inference_batch_tokens=inference_batch_tokens,
        ),
    )


def opposites(
    config: RunConfig, placement: tuple[Replica, ...], num_micro_batches: int, bidirectional: bool | None
) -> tuple[tuple[Replica, ...], tuple[Replica, ...] | None]:
    """The placement, with opposite replicas where they are asked for, and what to take instead if that is faster.

    Raises:
        ValueError: they are asked for where they cannot be.
    """
    is_possible = config.intra_stage_fusion and can_have_opposites(placement, num_micro_batches)
    if not bidirectional:
        is_chosen_later = bidirectional is None and is_possible and config.balance_stages
        return placement, with_opposites(placement) if is_chosen_later else None
    if not is_possible:
        raise ValueError(
            f"bidirectional=True with {len(placement[0].ranks)} pipeline stages, {num_micro_batches} micro-batches per "
            f"optimizer step and intra_stage_fusion={config.intra_stage_fusion}: opposite replicas need fusion, stages "
            f"on at least 2 devices, and a micro-batch each ({2 * len(placement)} here); change that, or leave "
            f"bidirectional out"
        )
    return with_opposites(placement), None


def late_columns(
    config: RunConfig, algorithm: Algorithm, placement: tuple[Replica, ...], forward_only: bool | None
) -> frozenset[str]:
    """What may be scored within training, as far as that is known before models are placed.

    Raises:
        ValueError: it is asked for, and nothing can be.
    """
    if forward_only is False:
        return frozenset()
    if config.auxiliary_dataset is not None:
        if forward_only:
            raise ValueError(
                "forward_only=True with auxiliary_dataset, whose micro-batches nothing scores: leave one of them out"
            )
        return frozenset()
    found = set[str]()
    if config.intra_stage_fusion and all(len(set(replica.ranks)) > 1 for replica in placement):
        if config.recomputes_logprobs:
            found.add(OLD_LOGPROBS)
        is_exposed = forward_only or not config.inter_stage_fusion
        if config.scoring != "whole" and config.tensor_parallel_size == 1 and is_exposed:
            found.add(REFERENCE_LOGPROBS)
    late = algorithm.late & found
    if forward_only and not late:
        raise ValueError(
            f"forward_only=True with {len(placement[0].ranks)} pipeline stages, old_logprobs={config.old_logprobs!r}, "
            f"scoring={config.scoring!r} and intra_stage_fusion={config.intra_stage_fusion}: nothing can be scored "
            f"within training; it needs fusion, stages on at least 2 devices, and no KL penalty in rewards, with "
            f"old_logprobs='trainer' for several optimizer steps, or a reference and scoring='sharded'; change that, "
            f"or leave forward_only out"
        )
    return late


def engine(config: RunConfig, autocast: torch.dtype | None = None, **limits: int | None) -> EngineFactory:
    """The engine that `config` asks for, with further limits of `choose_engine`.

    Raises: ValueError when its package is not installed.
    """
    return choose_engine(
        config.engine,
        max_batch=config.engine_batch_size,
        kv_cache_bytes=config.generation_cache_bytes,
        captures_decode=config.generation_cuda_graphs,
        speculation=config.speculation,
        autocast=autocast,
        **limits,
    )


def num_devices(config: RunConfig) -> int:
    """As many as asked for; by default every GPU, or two cores."""
    if config.num_devices is not None:
        return config.num_devices
    return torch.cuda.device_count() if config.accelerator == "cuda" else min(2, len(os.sched_getaffinity(0)))


def _engine_limits(config: RunConfig, actor: PretrainedConfig) -> EngineLimits:
    """An engine has room for a full batch of samples as long as the model allows."""
    context = num_positions(actor) or _UNBOUNDED
    return EngineLimits(
        max_batch=config.engine_batch_size,
        kv_capacity_tokens=config.engine_batch_size * context,
        max_new_tokens=config.max_response_tokens,
    )


def _kv_bytes_per_token(actor: PretrainedConfig, dtype: torch.dtype | None) -> int:
    """Keys and values of all layers, in float32 by default."""
    return kv_values(actor) * (dtype or torch.float32).itemsize
