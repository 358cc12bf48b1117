"""Whether a run's memory suffices, asked before anything starts, and what its planner may count on."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fuse import roles
from fuse.config.prompt_tokens import PromptTokens
from fuse.config.run import RunConfig
from fuse.driver.fleet_settings import FleetSettings
from fuse.driver.memory import Ledger, Phase, ledger
from fuse.driver.memory_setup import MemorySetup, planned_models
from fuse.intrastage.cost_profile import Shape
from fuse.training.model_spec import ModelSpec

_logger = logging.getLogger(__name__)

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_GB = 1e9


def within_memory(
    config: RunConfig, settings: FleetSettings, models: Mapping[str, PreTrainedModel], prompts: PromptTokens
) -> FleetSettings:
    """The settings with what training may take of memory, once the run is known to fit. models: by role.

    On GPUs all is counted. On CPUs only what is certain: weights, gradients and moments, over all processes here.

    Raises:
        ValueError: the run does not fit.
    """
    if prompts.most is not None:
        longest = Shape(config.per_device_train_batch_size, prompts.most + config.max_response_tokens)
        settings = replace(settings, plan=replace(settings.plan, longest=longest))
    if config.accelerator == "cpu":
        if config.ray_address is None:
            _check_host(settings, models)
        return settings
    try:
        setup = _setup(config, settings, models, prompts, device_memory_bytes())
    except ValueError as error:
        _logger.warning("memory is not planned: %s", error)
        return settings
    _check_devices(ledger(setup, plans_fusion=False))
    return replace(settings, memory=setup)


def device_memory_bytes() -> int:
    """Of the smallest GPU here."""
    devices = range(torch.cuda.device_count())
    return min(int(torch.cuda.get_device_properties(device).total_memory) for device in devices)


def host_memory_bytes() -> int:
    """Of this machine, or of the part of it that this container may use."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else "max"
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _setup(
    config: RunConfig,
    settings: FleetSettings,
    models: Mapping[str, PreTrainedModel],
    prompts: PromptTokens,
    memory_bytes: int,
) -> MemorySetup:
    training = settings.training
    return MemorySetup(
        models=planned_models(
            {role: ModelSpec.of(model) for role, model in models.items()},
            autocast=training.autocast,
            gradient_checkpointing=training.gradient_checkpointing,
            split_backward=training.split_backward,
        ),
        placement=settings.placement,
        num_devices=settings.num_devices,
        device_memory_bytes=memory_bytes,
        accelerator=settings.accelerator,
        prompt_tokens=prompts.typical if prompts.most is None else prompts.most,
        response_tokens=config.max_response_tokens,
        micro_batch_size=config.per_device_train_batch_size,
        num_micro_batches=settings.micro_batches_per_step,
        autocast=training.autocast,
        generation_dtype=training.autocast or torch.float32,
        engine_batch_size=config.engine_batch_size,
        inference_batch_size=settings.scoring.limit.max_samples,
        inference_batch_tokens=settings.scoring.limit.max_tokens,
        is_fused=training.split_backward,
        tensor_parallel_size=training.tensor_parallel_size,
        engine=config.engine,
        generation_cache_bytes=config.generation_cache_bytes,
    )


def _check_devices(planned: Ledger) -> None:
    if planned.fits:
        return
    device, memory_bytes = planned.fullest_device, planned.setup.device_memory_bytes
    phase = max(Phase, key=lambda one: planned.total(device, one))
    largest = sorted(planned.devices[device], key=lambda entry: -entry.bytes.get(phase, 0))[:3]
    parts = ", ".join(f"{one.role} {one.what} {one.bytes.get(phase, 0) / _GB:.1f} GB" for one in largest)
    raise ValueError(
        f"the run does not fit: device {device} would hold {planned.total(device, phase)} bytes in {phase} and has "
        f"{memory_bytes} (most of it: {parts}): use more devices or smaller models, gradient_checkpointing, a lower "
        f"per_device_train_batch_size, response length or engine_batch_size; `fuse plan` says what fits"
    )


def _check_host(settings: FleetSettings, models: Mapping[str, PreTrainedModel]) -> None:
    """Engines and copies that score read weights where they lie in shared memory, once for all devices."""
    counts = {role: sum(parameter.numel() for parameter in model.parameters()) for role, model in models.items()}
    trains = roles.training(models)
    needed = sum(counts[role] * model.dtype.itemsize for role, model in models.items())  # the driver's own
    needed += sum(4 * count for count in counts.values())
    for role in trains:
        trained = sum(parameter.numel() for parameter in models[role].parameters() if parameter.requires_grad)
        num_replicas = sum(replica.model == role for replica in settings.placement)
        needed += num_replicas * (4 * counts[role] + 12 * trained)
    most = host_memory_bytes()
    if needed > most:
        raise ValueError(
            f"the run does not fit: weights, gradients and moments of {', '.join(models)} take {needed} bytes and this "
            f"machine has {most}: use smaller models, or fewer replicas of them (more actor_stages, critic_stages)"
        )
