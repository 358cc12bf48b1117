"""A run's processes, started while its models are still being loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fuse.driver.engine_choice import EngineFactory
from fuse.workers.cluster import Accelerator, Cluster
from fuse.workers.generation_handle import GenerationHandle

IMPORTED = ("fuse.engines.transformers", "fuse.training.rank")
"""What a run's processes need that takes long to import."""


@contextmanager
def early_start(
    num_devices: int, ray_address: str | None, accelerator: Accelerator, engine: EngineFactory
) -> Iterator[Cluster]:
    """The cluster of a run on these devices, whose generation workers' processes import what the engine needs."""
    with Cluster(num_devices, ray_address=ray_address, accelerator=accelerator, imported=IMPORTED) as cluster:
        for device in range(num_devices):
            GenerationHandle.warm(cluster, device, engine)
        yield cluster
