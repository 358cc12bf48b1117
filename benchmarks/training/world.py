"""Training workers on all devices, which have met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Concatenate, Generic, ParamSpec, TypeVar

from fuse.benchmarks.training.worker import TrainingWorker
from fuse.driver.early_start import IMPORTED
from fuse.training.rank import TrainingSettings
from fuse.workers.calls import Worker, gather
from fuse.workers.cluster import Cluster

_W = TypeVar("_W", bound=TrainingWorker)
_P = ParamSpec("_P")
_T = TypeVar("_T")


class World(Generic[_W]):
    """One worker per device."""

    def __init__(self, workers: Sequence[Worker[_W]]) -> None:
        self._workers = workers

    @property
    def size(self) -> int:
        """Devices."""
        return len(self._workers)

    def call(self, method: Callable[Concatenate[_W, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> list[_T]:
        """Call a method of all workers at once; what each returns."""
        return gather([worker.call(method, *args, **kwargs) for worker in self._workers])


@contextmanager
def started(worker_class: type[_W], num_devices: int, settings: TrainingSettings) -> Iterator[World[_W]]:
    """Workers of this class in a cluster of their own.

    Raises:
        ValueError: there are fewer devices.
    """
    with Cluster(num_devices, imported=IMPORTED) as cluster:
        workers = [
            cluster.spawn("training worker", device, worker_class, device, settings) for device in range(num_devices)
        ]
        world, host = World(workers), cluster.host(0)
        port = workers[0].call(worker_class.serve_store, host).result()
        world.call(worker_class.connect, host, port, num_devices)
        yield world
