"""Real worker processes that outlive a run: starting them takes longer than the runs of this suite."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayError

from fuse.driver import early_start, fleet
from fuse.intrastage import communication, stage_balance
from fuse.workers.calls import Worker
from fuse.workers.cluster import Cluster

_PATIENCE_S = 10.0


class WorkerPool:
    """Called in place of `Cluster`, it hands out the same processes every time, with new workers in them.

    Those of the first devices that no other run has.
    """

    def __init__(self, num_devices: int) -> None:
        self.cluster = Cluster(num_devices)
        self.processes: dict[tuple[str, int], Worker[Any]] = {}
        self.free = list(range(num_devices))

    def __enter__(self) -> WorkerPool:
        self.cluster.__enter__()
        self.cluster._cores = []  # on any core: most runs have the first device alone, and other tests run beside these
        return self

    def __exit__(self, *exception: object) -> None:
        self.cluster.__exit__(*exception)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Runs have their workers in these processes, and are soon content with how their stages are balanced."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (fleet, early_start):
                patch.setattr(module, "Cluster", self)
            patch.setattr(stage_balance, "_SOLVE_S", 0.1)
            yield

    def end(self, role: str) -> None:
        """End processes that no other run can have; the next ones are new."""
        for key in [key for key in self.processes if key[0] == role]:
            self.cluster.kill(self.processes.pop(key))

    def __call__(self, num_devices: int, **options: Any) -> _Lease:
        return _Lease(self, num_devices)


class _Lease:
    """The part of a `Cluster` that a run sees."""

    def __init__(self, pool: WorkerPool, num_devices: int) -> None:
        self._pool, self._num_devices = pool, num_devices
        self._devices: list[int] = []
        self._workers: dict[tuple[str, int], Any] = {}  # their classes

    def __enter__(self) -> _Lease:
        self._devices, self._pool.free = self._pool.free[: self._num_devices], self._pool.free[self._num_devices :]
        assert len(self._devices) == self._num_devices, "other runs have the pool's devices"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Workers are closed, and leave their world; processes that cannot, for one has died, are not used again.

        Raises: why one cannot, where the run itself has raised nothing, of which that would be the consequence.
        """
        self._pool.free = sorted((*self._pool.free, *self._devices))
        processes = self._pool.processes
        left = {key: self._leave(processes[key], held) for key, held in self._workers.items() if key in processes}
        pending, patience_s = [*itertools.chain(*left.values())], None
        while pending:
            ended, pending = ray.wait(pending, timeout=patience_s)
            if not ended:
                break
            if _failure(ended) is not None:
                patience_s = _PATIENCE_S  # with those that may be waiting for it
        failures = {key: failure for key, answers in left.items() if (failure := _failure(answers)) is not None}
        for key in failures:
            self._pool.cluster.kill(processes.pop(key))
        if kind is None and failures and not any(isinstance(one, RayActorError) for one in failures.values()):
            raise next(iter(failures.values()))

    @staticmethod
    def _leave(process: Worker[Any], held: Any) -> list[ray.ObjectRef[Any]]:
        close = [process._actor.call.remote("close")] if hasattr(held, "close") else []
        return [*close, process._actor.start.remote(None, communication.disconnect, (), {})]

    def host(self, device: int) -> str:
        return self._pool.cluster.host(self._devices[device])

    def elsewhere(self) -> dict[str, Worker[Any]]:
        return {}

    def warm(self, *arguments: object) -> None:
        """The processes have started and imported."""

    def kill(self, worker: Worker[Any]) -> None:
        del self._pool.processes[worker.role, worker.device]
        self._pool.cluster.kill(worker)

    def spawn(self, role: str, device: int, worker_class: type, *args: Any, **kwargs: Any) -> Worker[Any]:
        key = ("model worker" if role == "training worker" else role, self._devices[device])
        self._workers[key] = worker_class
        worker = self._pool.processes.get(key)
        if worker is None:
            worker = self._pool.cluster.spawn(*key, worker_class, *args, **kwargs)
            self._pool.processes[key] = worker
        else:
            worker._started = worker._actor.start.remote(None, worker_class, args, kwargs)
        return worker


def _failure(answers: list[ray.ObjectRef[Any]]) -> RayError | None:
    """Why one of these calls has not ended well."""
    try:
        ray.get(answers, timeout=0)
    except RayError as error:
        return error
    return None
