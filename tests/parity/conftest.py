"""The oracle's runs, computed once per session, and the Ray cluster that the replays share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from fuse.workers.ray_session import local_cluster

from ..worker_pool import WorkerPool
from . import in_process
from .cases import Case
from .oracle import Recording, record


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Recording]:
    return cache(lambda case: record(case, tmp_path_factory.mktemp(f"oracle-{case.name}")))


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster that runs in this process join, with room for the pools and for a run of its own beside them."""
    with local_cluster(8):
        yield


@pytest.fixture(scope="package")
def worker_pool(ray_cluster: None) -> Iterator[WorkerPool]:
    """The processes of two devices."""
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture
def pooled_workers(worker_pool: WorkerPool) -> Iterator[None]:
    """Workers of two devices run in the pool's processes."""
    with worker_pool.in_use():
        yield


@pytest.fixture(scope="package")
def large_worker_pool(ray_cluster: None) -> Iterator[WorkerPool]:
    """The processes of four devices."""
    with WorkerPool(4) as pool:
        yield pool


@pytest.fixture
def pool_of_four(large_worker_pool: WorkerPool) -> Iterator[None]:
    """Workers of four devices run in the large pool's processes."""
    with large_worker_pool.in_use():
        yield


@pytest.fixture
def in_process_workers(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of one device run inside this process."""
    in_process.use(monkeypatch)
