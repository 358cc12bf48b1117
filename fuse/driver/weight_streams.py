"""Weights after an update, straight from the stages that trained them to whoever computes by them.

The driver asks stages for a bucket each, has every receiver take them in, and asks for the next ones: a device offers
one bucket at a time, and the driver itself sees none of it. What carries it follows from where processes are: on the
sender's host the memory of its kind of device (`shared_memory`, `cuda_ipc`), to all other hosts one broadcast.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch

from fuse.driver.fleet_settings import FleetSettings
from fuse.intrastage.communication import CommunicationError
from fuse.intrastage.stage import Exported
from fuse.workers.calls import Future, gather, wait_ended
from fuse.workers.carriers.parcel import BUCKET_BYTES, Parcel, cut
from fuse.workers.cluster import Cluster
from fuse.workers.errors import WorkerError
from fuse.workers.model_handle import ModelHandle
from fuse.workers.weight_port import Membership
from fuse.workers.weight_taker import WeightTakerHandle

_logger = logging.getLogger(__name__)

_LOCAL = {"cpu": "shared memory", "cuda": "CUDA IPC"}
_REMOTE = {"cpu": "gloo", "cuda": "NCCL"}


class Receiver(Protocol):
    """A handle of a process that takes weights in."""

    def join(self, own: Membership) -> Future[None]: ...

    def leave(self, group: str) -> Future[None]: ...


_R = TypeVar("_R", bound=Receiver)


@dataclass(frozen=True, slots=True)
class _Group:
    """A sender, then those on other hosts that it broadcasts to, whose devices these are."""

    name: str
    members: tuple[Receiver, ...]
    devices: frozenset[int]


class WeightStreams:
    """The ways of a run's weights, for any number of updates."""

    def __init__(self, cluster: Cluster, settings: FleetSettings) -> None:
        self._cluster, self._settings = cluster, settings
        self._groups: dict[tuple[int, str], _Group] = {}
        self._holders: dict[str, list[bool]] = {}  # by model, which devices score by a copy of it
        self._numbers = itertools.count()
        self._told: set[str] = set()

    def to_all(
        self,
        models: Sequence[ModelHandle],
        role: str,
        part: Exported,
        engines: Mapping[int, WeightTakerHandle],
        copied: Sequence[str],
    ) -> dict[int, WorkerError]:
        """`to_engines`, and of the models `copied` `to_copies`: side by side where no call waits for another process.

        On several hosts broadcasts do, and devices that share stages gather matrices, all in one order.
        """
        assert role not in copied, f"{role} would be sent twice at once"

        def to_copies() -> None:
            for one in copied:
                self.to_copies(models, one, one)

        shares = self._settings.training.tensor_parallel_size > 1
        if shares or not self._is_one_host([*range(len(models)), *engines]):
            lost = self.to_engines(models, role, part, engines)
            to_copies()
            return lost
        with ThreadPoolExecutor(1) as beside:
            copies = beside.submit(to_copies)
            lost = self.to_engines(models, role, part, engines)
            copies.result()
        return lost

    def to_engines(
        self,
        models: Sequence[ModelHandle],
        role: str,
        part: Exported,
        engines: Mapping[int, WeightTakerHandle],
    ) -> dict[int, WorkerError]:
        """Have engines work by this part of a model's weights, cast to their type. engines: the process of each device.

        One that dies is dropped, with those that its death keeps from getting a broadcast. Returns why, by
        device.
        """
        receivers = _Receivers(dict(engines), may_die=True)
        shapes, num_buckets = self._begin(models, role, self._settings.generation_dtype, part)
        receivers.tell(lambda engine: engine.begin_weights(shapes))
        name = f"engines, {role}"
        with self._sending(models, role):
            self._send(models, role, num_buckets, name, receivers, lambda engine, parcel: engine.load(parcel))
            receivers.tell(lambda engine: engine.end_weights())
            receivers.wait()
        return receivers.lost

    def to_copies(self, models: Sequence[ModelHandle], role: str, copied: str, alpha: float | None = None) -> None:
        """Have copies of `copied` score by the weights of `role`, or move towards them by `alpha`.

        Raises: WorkerError when a receiver dies: it trains, too.
        """
        if copied not in self._holders:
            self._holders[copied] = gather([model.has_copy(copied) for model in models])
        holders = self._holders[copied]
        receivers = _Receivers({device: one for device, one in enumerate(models) if holders[device]}, may_die=False)
        if not receivers.live:
            return
        shapes, num_buckets = self._begin(models, role, torch.float32, "trained")
        receivers.tell(lambda model: model.begin_copy(copied, shapes))
        name = f"copies of {copied}"
        with self._sending(models, role):
            self._send(models, role, num_buckets, name, receivers, lambda model, one: model.copy(copied, one, alpha))
            receivers.wait()

    def _begin(
        self, models: Sequence[ModelHandle], role: str, dtype: torch.dtype, part: Exported
    ) -> tuple[dict[str, torch.Size], dict[int, int]]:
        """Have stages prepare to send; all that will come, and how many buckets of each device that sends."""
        parts = gather([model.begin_export(role, dtype, BUCKET_BYTES, part) for model in models])
        shapes = {name: shape for part in parts for name, shape in part.items()}
        assert len(shapes) == sum(map(len, parts)), "stages would send the same weight"
        return shapes, {device: len(cut(part, dtype, BUCKET_BYTES)) for device, part in enumerate(parts) if part}

    @contextmanager
    def _sending(self, models: Sequence[ModelHandle], role: str) -> Iterator[None]:
        """In the body stages send; what the last bucket takes is free behind it."""
        try:
            yield
        finally:
            for model in models:
                model.end_export(role)  # nobody waits: one may have died

    def _send(
        self,
        models: Sequence[ModelHandle],
        role: str,
        num_buckets: Mapping[int, int],
        to: str,
        receivers: _Receivers[_R],
        give: Callable[[_R, Parcel], Future[None]],
    ) -> None:
        """Give receivers every bucket; who calls this waits for the last one. Devices that share a stage go in step."""
        size = self._settings.training.tensor_parallel_size
        for turn, devices in enumerate(self._turns(num_buckets, receivers)):
            if turn:
                receivers.wait()
            groups = {device: self._group(device, models[device], to, receivers) for device in devices}
            for index in range(max((num_buckets[device] for device in devices), default=0)):
                if index:
                    receivers.wait()  # a device offers one bucket at a time
                    self._close_broken(groups, to, receivers)
                asked = {
                    device: [model.export_next(role, _name(group)) for model in models[device : device + size]]
                    for device, group in groups.items()
                    if index < num_buckets[device]
                }
                parcels = {device: gather(exports)[0] for device, exports in asked.items()}
                receivers.hand_over(
                    [(parcel, groups[device]) for device, parcel in parcels.items() if parcel is not None], give
                )

    def _turns(self, senders: Iterable[int], receivers: _Receivers[_R]) -> list[list[int]]:
        """Which devices send side by side: all on one host; else one alone, for a member of several groups that
        broadcast at once could be in them in another order than the others."""
        senders = [*senders]
        return [senders] if self._is_one_host([*senders, *receivers.live]) else [[device] for device in senders]

    def _is_one_host(self, devices: Iterable[int]) -> bool:
        return len({self._cluster.host(device) for device in devices}) == 1

    # Broadcasts

    def _group(self, device: int, sender: ModelHandle, to: str, receivers: _Receivers[_R]) -> _Group | None:
        """The group by which a device's weights come to other hosts; opened again where its members have changed."""
        host, host_of = self._cluster.host(device), self._cluster.host
        far = {one: handle for one, handle in receivers.live.items() if host_of(one) != host}
        self._tell(device, to, sorted(receivers.live.keys() - far.keys()), sorted(far))
        members: tuple[Receiver, ...] = (sender, *far.values())
        if (device, to) in self._groups and self._groups[device, to].members != members:
            self._close(device, to)
        if far and (device, to) not in self._groups:
            group = _Group(f"weights-{next(self._numbers)}", members, frozenset(far))
            if not self._open(group, [host, *map(host_of, far)], sender, receivers):
                return None
            self._groups[device, to] = group
        return self._groups.get((device, to))

    def _open(self, group: _Group, hosts: Sequence[str], sender: ModelHandle, receivers: _Receivers[_R]) -> bool:
        """Have all members join. False where one died meanwhile; then all receivers among them are dropped."""
        (port,) = gather([sender.serve_group(hosts[0])])
        calls = [
            member.join(
                Membership(
                    group=group.name,
                    store=(hosts[0], port),
                    host=hosts[rank],
                    rank=rank,
                    size=len(hosts),
                    device=self._settings.accelerator,
                    timeout_s=self._settings.training.timeout_s,
                )
            )
            for rank, member in enumerate(group.members)
        ]
        try:
            gather(calls)
        except WorkerError as error:
            receivers.drop(group.devices, error)
            return False
        return True

    def _close_broken(self, groups: dict[int, _Group | None], to: str, receivers: _Receivers[_R]) -> None:
        """Those whose members have not all lived."""
        for device, group in groups.items():
            if group is not None and not group.devices <= receivers.live.keys():
                self._close(device, to)
                groups[device] = None

    def _close(self, device: int, to: str) -> None:
        group = self._groups.pop((device, to))
        for member in group.members:
            member.leave(group.name)  # nobody waits: one has died

    def _tell(self, device: int, to: str, near: Sequence[int], far: Sequence[int]) -> None:
        """Say by what weights go there, once."""
        kind = self._settings.accelerator
        ways = [(near, _LOCAL[kind]), (far, f"{_REMOTE[kind]} broadcast")]
        text = " and ".join(f"to devices {', '.join(map(str, ends))} by {way}" for ends, way in ways if ends)
        line = f"weights for {to}: from device {device} {text}, {BUCKET_BYTES >> 20} MiB or one tensor at a time"
        if line not in self._told:
            self._told.add(line)
            _logger.info("%s", line)


def _name(group: _Group | None) -> str | None:
    return None if group is None else group.name


class _Receivers(Generic[_R]):
    """Those that still take weights in, by device; and why others do not any more.

    Calls of a receiver run in their order, so that none is waited for before `wait`. may_die: else a death is raised.
    """

    def __init__(self, live: dict[int, _R], *, may_die: bool) -> None:
        self.live, self.lost = live, dict[int, WorkerError]()
        self._may_die = may_die
        self._calls: dict[Future[None], frozenset[int]] = {}  # and the devices that fail together with each

    def drop(self, devices: Iterable[int], error: WorkerError) -> None:
        """Raises: the error, where it is no death, or none may die."""
        cut_off = isinstance(error.raised, CommunicationError)
        if not (self._may_die and (error.is_death or cut_off)):
            raise error
        for device in devices:
            if self.live.pop(device, None) is not None:
                self.lost[device] = error

    def tell(self, call: Callable[[_R], Future[None]]) -> None:
        """Have all do something."""
        self._calls |= {call(one): frozenset({device}) for device, one in self.live.items()}

    def hand_over(
        self, parcels: Iterable[tuple[Parcel, _Group | None]], give: Callable[[_R, Parcel], Future[None]]
    ) -> None:
        """Have all take buckets in: those of a bucket's group by its broadcast, all others at its address."""
        for parcel, group in parcels:
            far = frozenset[int]() if group is None else group.devices
            by_group = replace(parcel, address=None, group=_name(group))
            for device, one in self.live.items():
                call = give(one, by_group if device in far else parcel)
                self._calls[call] = far if device in far else frozenset({device})

    def wait(self) -> None:
        """Until all calls have ended, but for those of devices that fail together with one that has failed."""
        calls, self._calls = self._calls, {}
        while calls:
            for future in wait_ended([*calls]):
                devices = calls.pop(future, None)
                if devices is None:
                    continue
                try:
                    future.result()
                except WorkerError as error:
                    self.drop(devices, error)
                    calls = {one: those for one, those in calls.items() if not those & devices}
