"""The engines of a run: one per device or per several, each in processes of its own, replaced when one dies."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from fuse.driver.fleet_settings import FleetSettings
from fuse.engines.lockstep import Group
from fuse.training.model_spec import ModelSpec
from fuse.workers.calls import Future, Worker, gather
from fuse.workers.cluster import Cluster
from fuse.workers.engine_follower import EngineFollower
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.weight_taker import WeightTakerHandle
from fuse.workers.weights import WeightsRef

_T = TypeVar("_T")

_Followers = tuple[bytes, tuple[Worker[EngineFollower], ...]]
"""Processes that share an engine with its generation worker, and the key by which it knows them."""

_MOST_REPLACEMENTS = 3
"""Of an engine in a row, before it is given up."""

_logger = logging.getLogger(__name__)


class Engines:
    """Generation workers, one for every `engine_devices` devices: engine e has devices e * engine_devices and on.

    spec, weights: of the actor, to begin with. current: gives its weights as they are when an engine is replaced.

    Raises: ValueError when devices of one engine are on different hosts.
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
        self.devices = _devices_by_engine(cluster, settings.num_devices, settings.engine_devices)
        started = [self._start_followers(devices[1:], weights) for devices in self.devices]
        self.workers = [self._spawn(engine, started[engine], weights) for engine in range(len(self.devices))]

    def wait_started(self, tell: Callable[[str], None]) -> None:
        """Until all are there."""
        for devices, engine in zip(self.devices, self.workers, strict=True):
            tell(f"starting: the engine of device {' and '.join(map(str, devices))}")
            engine.worker.wait_started()

    def call(self, method: Callable[[GenerationHandle], Future[_T]]) -> list[_T]:
        """Call all engines; one that has died is replaced, and the new one called.

        Raises: WorkerError when one raised, or died over and over.
        """
        futures = [method(engine) for engine in self.workers]
        return [self._answer(engine, future, method) for engine, future in enumerate(futures)]

    def replace(self, engine: int) -> GenerationHandle:
        """Another generation worker in place of one that died, with the actor's weights as they are now."""
        for worker in self.workers[engine].processes:
            self._cluster.kill(worker)
        weights = self._current()
        followers = self._start_followers(self.devices[engine][1:], weights)
        self.workers[engine] = self._spawn(engine, followers, weights)
        return self.workers[engine]

    def replace_lost(self, lost: Mapping[int, WorkerError]) -> None:
        """`replace` those of these devices. lost: why they are."""
        for engine, devices in enumerate(self.devices):
            errors = [lost[device] for device in devices if device in lost]
            if errors:
                _logger.warning("%s; another takes its place", errors[0])
                self.replace(engine)

    @property
    def takers(self) -> dict[int, WeightTakerHandle]:
        """The process of each device, as one that takes weights."""
        return {
            device: taker
            for devices, engine in zip(self.devices, self.workers, strict=True)
            for device, taker in zip(devices, engine.takers, strict=True)
        }

    def by_device(self, of_engines: Sequence[_T]) -> list[_T]:
        """What there is of every engine, for each of its devices."""
        return [one for one, devices in zip(of_engines, self.devices, strict=True) for _ in devices]

    @property
    def process_ids(self) -> list[int]:
        """Of all engines."""
        return [one.process_id for engine in self.workers for one in engine.processes]

    def _start_followers(self, devices: Sequence[int], weights: Sequence[WeightsRef]) -> _Followers:
        settings, key = self._settings, secrets.token_bytes()
        if not devices:
            return key, ()
        follow = partial(settings.engine.follow, self._spec, settings.accelerator)
        return key, tuple(GenerationHandle.spawn_follower(self._cluster, one, key, follow, weights) for one in devices)

    def _spawn(self, engine: int, started: _Followers, weights: Sequence[WeightsRef]) -> GenerationHandle:
        settings, device, (key, followers) = self._settings, self.devices[engine][0], started
        group: tuple[Group, ...] = ()
        if followers:
            addresses = gather([follower.call(EngineFollower.address) for follower in followers])
            group = (Group(tuple(addresses), key),)
        make_engine = partial(settings.engine, self._spec, weights, settings.accelerator, *group)
        return GenerationHandle.spawn(self._cluster, device, make_engine, settings.kv_transfer, followers)

    def _answer(self, engine: int, future: Future[_T], method: Callable[[GenerationHandle], Future[_T]]) -> _T:
        for _ in range(_MOST_REPLACEMENTS):
            try:
                return future.result()
            except WorkerError as error:
                if not error.is_death:
                    raise
                _logger.warning("%s; another takes its place", error)
                future = method(self.replace(engine))
        return future.result()


def _devices_by_engine(cluster: Cluster, num_devices: int, engine_devices: int) -> list[tuple[int, ...]]:
    devices = [tuple(range(first, first + engine_devices)) for first in range(0, num_devices, engine_devices)]
    for own in devices:
        hosts = sorted({cluster.host(device) for device in own})
        if len(hosts) > 1:
            raise ValueError(
                f"generation_tensor_parallel_size={engine_devices} puts the engine of devices {own[0]} to {own[-1]} on "
                f"several hosts ({', '.join(hosts)}): choose a divisor of each host's devices"
            )
    return devices
