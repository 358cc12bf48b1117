"""One Ray cluster for all runs of this folder, and processes for those that end well: both outlast a tiny run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fuse import PPOTrainer
from fuse.workers import fleet
from fuse.workers.ray_session import local_cluster

from ..worker_pool import WorkerPool
from . import tiny


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Joined by runs in this process; with room for the pool's two devices and for two more beside them."""
    with local_cluster(num_cpus=4):
        yield


@pytest.fixture(scope="package")
def worker_pool(cluster: None) -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture
def pooled_workers(worker_pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in the pool's processes."""
    monkeypatch.setattr(fleet, "Cluster", worker_pool)


@pytest.fixture
def train_pooled(worker_pool: WorkerPool) -> Callable[..., PPOTrainer]:
    """`tiny.train` in the pool's processes, beside which other runs have their own."""

    def train(*arguments: Any, **options: Any) -> PPOTrainer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fleet, "Cluster", worker_pool)
            return tiny.train(*arguments, **options)

    return train
