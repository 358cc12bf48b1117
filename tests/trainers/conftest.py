"""One Ray cluster for all runs of this folder, and processes for those that end well: both outlast a tiny run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuse.workers.ray_session import local_cluster

from ..worker_pool import WorkerPool


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """Joined by runs in this process; with room for the pool's two devices and for two more beside them."""
    with local_cluster(num_cpus=4):
        yield


@pytest.fixture(scope="package")
def worker_pool(cluster: None) -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool
