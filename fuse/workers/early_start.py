"""A run's processes, started while its models are still being loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fuse.config import PPOConfig
from fuse.workers.cluster import Cluster
from fuse.workers.engine_choice import choose_engine
from fuse.workers.fleet_settings import num_devices
from fuse.workers.generation_worker import GenerationWorker


@contextmanager
def early_start(config: PPOConfig) -> Iterator[Cluster]:
    """The cluster of a run with this configuration, whose generation workers' processes import what they need."""
    with Cluster(num_devices(config), ray_address=config.ray_address, accelerator=config.accelerator) as cluster:
        for device in range(cluster.num_devices):
            cluster.warm("generation worker", device, GenerationWorker, choose_engine(config, None))
        yield cluster
