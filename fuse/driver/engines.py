"""The engines of a run: one per device, each in a process of its own, which another replaces when it dies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from fuse.driver.fleet_settings import FleetSettings
from fuse.training.model_spec import ModelSpec
from fuse.workers.calls import Future
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.weights import WeightsRef

_T = TypeVar("_T")

_MOST_REPLACEMENTS = 3
"""Of an engine in a row, before it is given up."""

_logger = logging.getLogger(__name__)


class Engines:
    """Generation workers by device.

    spec, weights: of the actor, to begin with. current: gives its weights as they are when an engine is replaced.
    """

    def __init__(
        self,
        cluster: Cluster,
        settings: FleetSettings,
        spec: ModelSpec,
        weights: Sequence[WeightsRef],
        current: Callable[[], Sequence[WeightsRef]],
    ) -> None:
        self._cluster, self._settings, self._spec, self._current = cluster, settings, spec, current
        self.workers = [self._spawn(device, weights) for device in range(settings.num_devices)]

    def wait_started(self, tell: Callable[[str], None]) -> None:
        """Until all are there."""
        for device, engine in enumerate(self.workers):
            tell(f"starting: the engine of device {device}")
            engine.worker.wait_started()

    def call(self, method: Callable[[GenerationHandle], Future[_T]]) -> list[_T]:
        """Call all engines; one that has died is replaced, and the new one called.

        Raises: WorkerError when one raised, or died over and over.
        """
        futures = [method(engine) for engine in self.workers]
        return [self._answer(device, future, method) for device, future in enumerate(futures)]

    def replace(self, device: int) -> GenerationHandle:
        """Another generation worker in place of one that died, with the actor's weights as they are now."""
        self._cluster.kill(self.workers[device].worker)
        engine = self.workers[device] = self._spawn(device, self._current())
        return engine

    def replace_lost(self, lost: Mapping[int, WorkerError]) -> None:
        """`replace` those of these devices. lost: why they are."""
        for device, error in lost.items():
            _logger.warning("%s; another takes its place", error)
            self.replace(device)

    def _spawn(self, device: int, weights: Sequence[WeightsRef]) -> GenerationHandle:
        settings = self._settings
        make_engine = partial(settings.engine, self._spec, weights, settings.accelerator)
        return GenerationHandle.spawn(self._cluster, device, make_engine, settings.kv_transfer)

    def _answer(self, device: int, future: Future[_T], method: Callable[[GenerationHandle], Future[_T]]) -> _T:
        for _ in range(_MOST_REPLACEMENTS):
            try:
                return future.result()
            except WorkerError as error:
                if not error.is_death:
                    raise
                _logger.warning("%s; another takes its place", error)
                future = method(self.replace(device))
        return future.result()
