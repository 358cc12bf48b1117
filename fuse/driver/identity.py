"""What a run's measurements depend on, so that another run may use them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch

from fuse.driver.fleet_settings import FleetSettings
from fuse.intrastage.measurement_store import machine
from fuse.training.model_spec import ModelSpec

_FORMAT = 6
_NO_MATTER = ("architectures", "transformers_version", "_name_or_path", "torch_dtype")


def identity(settings: FleetSettings, trained: Mapping[str, ModelSpec]) -> dict[str, object]:
    """Models, how they train, on what, and micro-batches of which size."""
    training = settings.training
    return {
        "format": _FORMAT,
        "models": {name: _digest(spec) for name, spec in trained.items()},
        "placement": [asdict(replica) for replica in settings.placement],
        "alternative": None if settings.alternative is None else [asdict(one) for one in settings.alternative],
        "backend": training.backend,
        "fused": settings.plan.fused,
        "tensor_parallel_size": training.tensor_parallel_size,
        "autocast": str(training.autocast),
        "gradient_checkpointing": training.gradient_checkpointing,
        "micro_batch": None if settings.balance is None else asdict(settings.balance),
        "micro_batches_per_step": settings.micro_batches_per_step,
        "regrouped": sorted(training.units),
        "packed": training.layout.packs,
        "least_micro_batches": None if settings.plan.chooses_number else training.least_micro_batches,
        "accelerator": torch.cuda.get_device_name() if settings.accelerator == "cuda" else machine(),
        "torch": torch.__version__,
    }


def _digest(spec: ModelSpec) -> str:
    config = {name: value for name, value in spec.config.to_dict().items() if name not in _NO_MATTER}
    told = [spec.model_class.__name__, config, sorted(spec.frozen), spec.adapters.digest]
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
