"""Weights after an update, straight from the stages that trained them to whoever computes by them.

The driver asks stages for a bucket each, has every receiver take them in, and asks for the next ones: a device offers
one bucket of a stream at a time, and the driver itself sees none of it. Calls of a process run in order, so nobody
waits for their answers in between: once shapes are known, weights that fit a bucket take two rounds of calls, those of
all streams the same two. What carries it follows from where processes are: on the sender's host the memory of its kind
of device (`shared_memory`, `cuda_ipc`), to all other hosts one broadcast.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, Protocol, TypeAlias, TypeVar

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


Stream: TypeAlias = Generator[None, None, dict[int, WorkerError]]
"""Goes on to where it would wait for what it has asked; gives in the end why devices were dropped, if any were."""


def after_a_turn(call: Callable[[], object]) -> Stream:
    """Does this while what other streams have asked is under way."""
    yield
    call()
    return {}


def _one_after_another(streams: Iterable[Stream]) -> Stream:
    lost: dict[int, WorkerError] = {}
    for stream in streams:
        lost |= yield from stream
    return lost


class Receiver(Protocol):
    """A handle of a process that takes weights in."""

    def join(self, own: Membership) -> Future[None]: ...

    def leave(self, group: str) -> Future[None]: ...


_R = TypeVar("_R", bound=Receiver)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """What stages send of a model.

    parts: by device, shapes by name. shapes: of all that will come. num_buckets: of each device that sends.
    """

    parts: list[dict[str, torch.Size]]
    shapes: Mapping[str, torch.Size]
    num_buckets: Mapping[int, int]

    @classmethod
    def of(cls, parts: list[dict[str, torch.Size]], dtype: torch.dtype) -> _Outgoing:
        shapes = {name: shape for part in parts for name, shape in part.items()}
        assert len(shapes) == sum(map(len, parts)), "stages would send the same weight"
        num_buckets = {device: len(cut(part, dtype, BUCKET_BYTES)) for device, part in enumerate(parts) if part}
        return cls(parts, shapes, num_buckets)


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
        self._outgoing: dict[tuple[str, torch.dtype, Exported], _Outgoing] = {}
        self._holders: dict[str, list[bool]] = {}  # by what is copied
        self._groups: dict[tuple[int, str], _Group] = {}
        self._numbers = itertools.count()
        self._told: set[str] = set()

    def run(self, *streams: Stream, beside: Sequence[Stream] = ()) -> dict[int, WorkerError]:
        """Have all of them go on in turn until they have ended. Returns why devices were dropped.

        beside: send nothing; on several hosts, all others go one after the other.
        """
        # Broadcasts of several streams could be in another order for one of their members than for the others.
        sending = streams if self._is_one_host else [_one_after_another(streams)]
        lost: dict[int, WorkerError] = {}
        with ExitStack() as ends:
            waiting = deque([ends.enter_context(closing(stream)) for stream in (*beside, *sending)])
            while waiting:
                stream = waiting.popleft()
                try:
                    next(stream)
                except StopIteration as ended:
                    lost |= ended.value
                else:
                    waiting.append(stream)
        return lost

    def to_engines(
        self,
        models: Sequence[ModelHandle],
        role: str,
        part: Exported,
        engines: Mapping[int, WeightTakerHandle],
    ) -> Stream:
        """Have engines work by this part of a model's weights, cast to their type. engines: the process of each device.

        One that dies is dropped, with those that its death keeps from getting a broadcast.
        """
        receivers = _Receivers(dict(engines), may_die=True)
        to = f"engines, {role}"
        with self._sending(models, role, to, self._settings.generation_dtype, part, receivers) as sent:
            receivers.ask(lambda engine: engine.begin_weights(sent.shapes))
            yield from self._send(models, sent, to, receivers, lambda engine, some: engine.load(some))
            receivers.ask(lambda engine: engine.end_weights())
            yield
        return receivers.lost

    def to_copies(self, models: Sequence[ModelHandle], role: str, copied: str, alpha: float | None = None) -> Stream:
        """Have copies of `copied` score by the weights of `role`, or move towards them by `alpha`.

        Raises: WorkerError when a receiver dies: it trains, too.
        """
        if copied not in self._holders:
            self._holders[copied] = gather([model.has_copy(copied) for model in models])
        holders = self._holders[copied]
        receivers = _Receivers({device: one for device, one in enumerate(models) if holders[device]}, may_die=False)
        if not receivers.live:
            return {}
        to = f"copies of {copied}"
        with self._sending(models, role, to, torch.float32, "trained", receivers) as sent:
            receivers.ask(lambda model: model.begin_copy(copied, sent.shapes))
            yield from self._send(models, sent, to, receivers, lambda model, some: model.copy(copied, some, alpha))
            yield
        return {}

    @cached_property
    def _is_one_host(self) -> bool:
        return len({self._cluster.host(device) for device in range(self._settings.num_devices)}) == 1

    @contextmanager
    def _sending(
        self,
        models: Sequence[ModelHandle],
        role: str,
        to: str,
        dtype: torch.dtype,
        part: Exported,
        receivers: _Receivers[_R],
    ) -> Iterator[_Outgoing]:
        """Have stages prepare to send, and end when receivers have done what they were asked."""
        began = [model.begin_export(role, to, dtype, BUCKET_BYTES, part) for model in models]
        if (role, dtype, part) not in self._outgoing:
            self._outgoing[role, dtype, part] = _Outgoing.of(gather(began), dtype)
        sent = self._outgoing[role, dtype, part]
        try:
            yield sent
            receivers.wait()
            assert gather(began) == sent.parts, "stages send other weights than before"
        finally:
            for model in models:
                model.end_export(to)  # nobody waits: one may have died

    def _send(
        self,
        models: Sequence[ModelHandle],
        sent: _Outgoing,
        to: str,
        receivers: _Receivers[_R],
        give: Callable[[_R, Sequence[Parcel]], Future[None]],
    ) -> Iterator[None]:
        """Have receivers take in every bucket. Devices that share a stage go in step."""
        size, num_buckets = self._settings.training.tensor_parallel_size, sent.num_buckets
        # On several hosts one device sends alone, for the same reason as one stream does.
        for devices in [[*num_buckets]] if self._is_one_host else [[device] for device in num_buckets]:
            if not self._is_one_host:
                receivers.wait()  # who has died is in no group
            groups = {device: self._group(device, models[device], to, receivers) for device in devices}
            for index in range(max((num_buckets[device] for device in devices), default=0)):
                if index:
                    yield
                    receivers.wait()  # they have done with the last bucket
                for device, group in groups.items():
                    if group is not None and not group.devices <= receivers.live.keys():
                        self._close(device, to)
                        groups[device] = None
                asked = {
                    device: [model.export_next(to, _name(group)) for model in models[device : device + size]]
                    for device, group in groups.items()
                    if index < num_buckets[device]
                }
                yield
                parcels = {device: gather(exports)[0] for device, exports in asked.items()}
                receivers.hand_over(
                    [(parcel, groups[device]) for device, parcel in parcels.items() if parcel is not None], give
                )

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

    may_die: else a death is raised.
    """

    def __init__(self, live: dict[int, _R], *, may_die: bool) -> None:
        self.live, self.lost = live, dict[int, WorkerError]()
        self._may_die = may_die
        self._asked: dict[Future[None], frozenset[int]] = {}  # whose calls they are: they fail together

    def drop(self, devices: Iterable[int], error: WorkerError) -> None:
        """Raises: the error, where it is no death, or none may die."""
        cut_off = isinstance(error.raised, CommunicationError)
        if not (self._may_die and (error.is_death or cut_off)):
            raise error
        for device in devices:
            if self.live.pop(device, None) is not None:
                self.lost[device] = error

    def ask(self, call: Callable[[_R], Future[None]]) -> None:
        """Have all do something, after what they were asked before."""
        self._asked |= {call(one): frozenset({device}) for device, one in self.live.items()}

    def hand_over(
        self, parcels: Sequence[tuple[Parcel, _Group | None]], give: Callable[[_R, Sequence[Parcel]], Future[None]]
    ) -> None:
        """Have all take buckets in, one call each: of a bucket's group by its broadcast, all others at its address."""
        for device, one in self.live.items():
            taken, together = list[Parcel](), frozenset({device})
            for parcel, group in parcels:
                if group is not None and device in group.devices:
                    together |= group.devices
                    parcel = replace(parcel, address=None, group=group.name)
                taken.append(parcel)
            if taken:
                self._asked[give(one, taken)] = together

    def wait(self) -> None:
        """Until all have done what they were asked, but for devices that fail together with one that has failed."""
        calls, self._asked = self._asked, {}
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
