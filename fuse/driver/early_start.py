"""A run's processes, started while its models are still being loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from fuse.driver.engine_choice import EngineFactory
from fuse.intrastage.adapters import Adapters
from fuse.workers.cluster import Accelerator, Cluster
from fuse.workers.generation_handle import GenerationHandle

IMPORTED = ("fuse.engines.transformers", "fuse.training.rank")
"""What a run's processes need that takes long to import."""


def imported_for(models: Iterable[PreTrainedModel]) -> tuple[str, ...]:
    """What processes of a run that trains these need."""
    return _imported(has_adapters=any(map(Adapters.of, models)))


def _imported(*, has_adapters: bool) -> tuple[str, ...]:
    """PEFT takes seconds."""
    return (*IMPORTED, "peft") if has_adapters else IMPORTED


@contextmanager
def early_start(
    num_devices: int,
    ray_address: str | None,
    accelerator: Accelerator,
    engine: EngineFactory,
    *,
    has_adapters: bool = False,
) -> Iterator[Cluster]:
    """The cluster of a run on these devices, whose generation workers' processes import what the engine needs."""
    modules = _imported(has_adapters=has_adapters)
    with Cluster(num_devices, ray_address=ray_address, accelerator=accelerator, imported=modules) as cluster:
        for device in range(num_devices):
            GenerationHandle.warm(cluster, device, engine)
        yield cluster
