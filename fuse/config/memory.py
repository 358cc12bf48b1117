"""Whether a run's memory suffices, asked before anything starts, and what its planner may count on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fuse import roles
from fuse.config.prompt_tokens import PromptTokens
from fuse.config.run import RunConfig
from fuse.driver.fleet_settings import FleetSettings
from fuse.driver.ledger_entry import Phase
from fuse.driver.memory import Ledger, fits, ledger
from fuse.driver.memory_setup import SCORING_CHOICES, MemorySetup, Scoring, larger, planned_models
from fuse.driver.size_cut import cut_by_size
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.opposite import has_opposites
from fuse.intrastage.placement import Replica
from fuse.intrastage.transformers_stage import check_stages

_logger = logging.getLogger(__name__)

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_GB = 1e9


def within_memory(
    config: RunConfig,
    settings: FleetSettings,
    models: Mapping[str, PreTrainedModel],
    prompts: PromptTokens,
    text: Shape | None = None,
) -> FleetSettings:
    """The settings with what training may take of memory, once the run is known to fit. models: by role.

    text: the largest micro-batch of text, where there is any.

    On GPUs all is counted. On CPUs only what is certain: weights, gradients and moments, over all processes here.
    Models score whole or in shares, and devices are shared in time, as `config` says, or as it fits. An alternative
    placement that does not fit beside that is dropped. Where even cuts do not fit, GPUs have them by size, unmeasured.

    Raises:
        ValueError: the run does not fit, or a model that is to score in shares cannot be cut.
    """
    if prompts.most is not None:
        longest = Shape(config.per_device_train_batch_size, prompts.most + config.max_response_tokens)
        settings = replace(settings, plan=replace(settings.plan, longest=larger(longest, text)))
    sharings = _sharings(config, settings)
    if config.accelerator == "cpu":
        if config.ray_address is not None:
            return _shared(settings, models, sharings[0])
        most = host_memory_bytes()
        for sharing in sharings:
            needed = _host_bytes(settings, settings.placement, models, sharing.scoring)
            if needed <= most:
                rival = settings.alternative
                keeps = rival is None or _host_bytes(settings, rival, models, sharing.scoring) <= most
                return _shared(settings if keeps else _without_alternative(settings), models, sharing)
        raise _exceeds_host(needed, most, models, settings.placement)
    try:
        setup = _setup(config, settings, models, prompts, device_memory_bytes(), text)
    except ValueError as error:
        _logger.warning("memory is not planned: %s", error)
        return _shared(replace(settings, alternative=None), models, sharings[0])
    for cut in _cuts(settings, setup):
        for sharing in sharings:
            planned = ledger(replace(setup, placement=cut.placement, **asdict(sharing)), plans_fusion=False)
            if planned.fits:
                return replace(_shared(_with_room(cut, planned.setup), models, sharing), memory=planned.setup)
    raise _does_not_fit(planned)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sharing:
    """How devices share models, and are shared in time, as of `MemorySetup`."""

    scoring: Scoring
    engines_sleep: bool
    offloads_training: bool


def _sharings(config: RunConfig, settings: FleetSettings) -> list[_Sharing]:
    """What users allow, what costs least first. Copies that follow the policy are whole."""
    yes_or_no = {"on": (True,), "off": (False,), "auto": (False, True)}
    scorings = SCORING_CHOICES[config.scoring]
    if settings.mixing is not None:
        scorings = tuple(scoring for scoring in scorings if scoring == "whole")
        if not scorings:
            raise ValueError(
                f"scoring={config.scoring!r} with sync_ref_model: shares of a reference do not follow the policy; set "
                f"scoring='auto' or 'whole'"
            )
    return [
        _Sharing(scoring=scoring, engines_sleep=sleeps, offloads_training=offloads)
        for offloads in yes_or_no[config.offload_training]
        for scoring in scorings
        for sleeps in yes_or_no[config.engines_sleep]
    ]


def _shared(settings: FleetSettings, models: Mapping[str, PreTrainedModel], sharing: _Sharing) -> FleetSettings:
    is_sharded = sharing.scoring == "sharded"
    if is_sharded:
        for role in roles.scoring(models):
            check_stages(models[role])
    return replace(
        settings,
        scoring=replace(settings.scoring, is_sharded=is_sharded),
        engines_sleep=sharing.engines_sleep,
        offloads_training=sharing.offloads_training,
    )


def _cuts(settings: FleetSettings, setup: MemorySetup) -> Iterator[FleetSettings]:
    """Even cuts first, which measured times may change; then, where other ones take less memory, those."""
    yield settings
    placement = cut_by_size(setup)
    if placement != settings.placement:
        _logger.info("stages are cut by size: memory has no room for even ones")
        yield replace(settings, placement=placement, alternative=None, balance=None)


def _with_room(settings: FleetSettings, setup: MemorySetup) -> FleetSettings:
    """Without an alternative for which there is none. setup: of what fits."""
    rival = settings.alternative
    if rival is None or fits(setup, rival):
        return settings
    return _without_alternative(settings)


def _without_alternative(settings: FleetSettings) -> FleetSettings:
    _logger.info("plain 1F1B: memory has no room for two opposite replicas of the actor")
    return replace(settings, alternative=None)


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
    text: Shape | None,
) -> MemorySetup:
    training = settings.training
    return MemorySetup(
        models=planned_models(
            {role: settings.spec(role, model) for role, model in models.items()},
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
        text=text,
        num_micro_batches=settings.micro_batches_per_step,
        autocast=training.autocast,
        generation_dtype=training.autocast or torch.float32,
        engine_batch_size=config.engine_batch_size,
        inference_batch_size=settings.scoring.limit.max_samples,
        inference_batch_tokens=settings.scoring.limit.max_tokens,
        is_fused=training.split_backward,
        averaged=frozenset(training.average_decays),
        tensor_parallel_size=training.tensor_parallel_size,
        engine=config.engine,
        generation_cache_bytes=config.generation_cache_bytes,
        engine_devices=config.generation_tensor_parallel_size,
        recomputes_logprobs=config.recomputes_logprobs,
    )


def _does_not_fit(planned: Ledger) -> ValueError:
    device, setup = planned.fullest_device, planned.setup
    phase = max(Phase, key=lambda one: planned.total(device, one))
    largest = sorted(planned.devices[device], key=lambda entry: -entry.bytes.get(phase, 0))[:3]
    parts = ", ".join(f"{one.role} {one.what} {one.bytes.get(phase, 0) / _GB:.1f} GB" for one in largest)
    allowed = {
        "scoring='sharded'": setup.scoring == "whole",
        "engines_sleep='on'": not setup.engines_sleep,
        "offload_training='on'": not setup.offloads_training,
        "a higher generation_tensor_parallel_size": setup.engine == "vllm" and setup.engine_devices < setup.num_devices,
    }
    remedies = "".join(f", {option}" for option, is_left in allowed.items() if is_left)
    return ValueError(
        f"the run does not fit with {setup.scoring} scoring: device {device} would hold "
        f"{planned.total(device, phase)} bytes in {phase} and has {setup.device_memory_bytes} (most of it: {parts}): "
        f"{_leave_out(setup.placement)}use more devices or smaller models, gradient_checkpointing, a lower "
        f"per_device_train_batch_size, response length or engine_batch_size{remedies}; `fuse plan` says what fits"
    )


def _host_bytes(
    settings: FleetSettings,
    placement: Sequence[Replica],
    models: Mapping[str, PreTrainedModel],
    scoring: Scoring,
) -> int:
    """Engines, copies that score and frozen parts of stages read weights where they lie in shared memory, once for all
    devices and models that have the same; copies that are mixed become each device's own.

    In shares, what trains has none but the engines', and of others there is as much. Stages hold what is frozen apart
    where it comes in another type.
    """
    models = {role: model for role, model in models.items() if role not in settings.variants}
    counts = {role: sum(parameter.numel() for parameter in model.parameters()) for role, model in models.items()}
    trains = roles.training(models)
    needed = sum(counts[role] * model.dtype.itemsize for role, model in models.items())  # the driver's own
    in_place = {role for role in trains if role != roles.GENERATING and scoring == "sharded"}
    for role, model in models.items():
        spec = settings.spec(role, model)
        own = [one for name, one in model.named_parameters() if spec.origin(role, name).role == role]
        needed += sum(4 * one.numel() for one in own if role not in in_place or not one.requires_grad)
    needed += sum(4 * counts[role] * settings.num_devices for role in settings.mixed_roles)
    for role in trains:
        trained = sum(parameter.numel() for parameter in models[role].parameters() if parameter.requires_grad)
        num_replicas = sum(replica.model == role for replica in placement)
        apart = 0 if models[role].dtype == torch.float32 else 4 * (counts[role] - trained)
        needed += num_replicas * (16 * trained + apart)
        if role in settings.training.average_decays:
            needed += 4 * trained + counts[role] * models[role].dtype.itemsize  # of all stages; the driver's own
    return needed


def _leave_out(placement: Sequence[Replica]) -> str:
    return "leave bidirectional out, " if has_opposites(placement) else ""


def _exceeds_host(needed: int, most: int, models: Iterable[str], placement: Sequence[Replica]) -> ValueError:
    return ValueError(
        f"the run does not fit: weights, gradients and moments of {', '.join(models)} take {needed} bytes and this "
        f"machine has {most}: {_leave_out(placement)}use smaller models, or fewer replicas of them (more "
        f"actor_stages, critic_stages)"
    )
