"""Devices and the workers on them: plain Python objects in processes of their own.

A device is one core, or one GPU with a core beside it: one bundle of a Ray placement group, which its workers share.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fuse.workers.calls import Worker
from fuse.workers.cores import claimed_cores
from fuse.workers.process import actor_class, concurrent_methods
from fuse.workers.ray_session import WORKER_ENVIRONMENT, joined_cluster, local_cluster, local_directory

Accelerator = Literal["cpu", "cuda"]

_SHARE_OF_DEVICE = 0.5
_PLACEMENT_TIMEOUT_S = 60.0

_W = TypeVar("_W")  # a worker's class
_P = ParamSpec("_P")


@dataclass(frozen=True, slots=True)
class Device:
    """Where a device is: `host` is its node's IP address; `slot` counts the run's devices on that host."""

    index: int
    host: str
    slot: int
    bundle: int


class Cluster:
    """`num_devices` devices and the workers spawned on them, for the length of a `with` block.

    Without `ray_address` a private cluster starts on this machine and stops with the block, unless this process
    already uses Ray, which is then used and left running. With it, the cluster there is joined ("host:port" or
    "auto"). Leaving the block, by whatever exception, ends every worker.

    imported: modules that the processes of a private cluster are born with; not where there are GPUs, which a process
    that is forked could not use if one of them did.

    Raises:
        ValueError: on entry, when there are fewer devices than asked for or nothing answers at the address.
    """

    def __init__(
        self,
        num_devices: int,
        *,
        ray_address: str | None = None,
        accelerator: Accelerator = "cpu",
        imported: Sequence[str] = (),
    ) -> None:
        if num_devices < 1:
            raise ValueError(f"num_devices={num_devices}: a run needs at least one device")
        if accelerator not in ("cpu", "cuda"):
            raise ValueError(f"accelerator={accelerator!r} is unknown: choose 'cpu' or 'cuda'")
        self.num_devices = num_devices
        self.devices: tuple[Device, ...] = ()
        self._ray_address = ray_address
        self._imported = imported if accelerator == "cpu" else ()
        self._accelerator = accelerator
        self._workers: list[Worker[Any]] = []
        self._warm: dict[tuple[str, int], Any] = {}  # actors that have no worker yet
        self._logs: Path | None = None
        self._cores: list[int] = []  # by device, the place of its core among its host's
        self._group: PlacementGroup | None = None
        self._resources = ExitStack()

    def __enter__(self) -> Cluster:
        with ExitStack() as resources:
            self._connect(resources)
            _require_devices(self.num_devices, self._accelerator)
            self._group = resources.enter_context(_reserve(self.num_devices, self._accelerator))
            self.devices = _devices(self._group)
            if self._accelerator == "cpu":
                self._cores = self._claim(resources)
            resources.callback(self._kill_workers)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def _connect(self, resources: ExitStack) -> None:
        if ray.is_initialized():
            joined = ray.get_runtime_context().gcs_address
            if self._ray_address not in (None, "auto", joined):
                raise ValueError(
                    f"ray_address={self._ray_address!r}, but this process already uses the Ray cluster at {joined}: "
                    "leave ray_address out, or call ray.shutdown() first"
                )
        elif self._ray_address is not None:
            resources.enter_context(joined_cluster(self._ray_address))
        else:
            num_cores = len(os.sched_getaffinity(0))
            if self._accelerator == "cpu" and self.num_devices > num_cores:
                raise _too_few(self.num_devices, num_cores, "core", "this machine")
            resources.enter_context(local_cluster(self.num_devices, self._imported))
        self._logs = local_directory()

    def _claim(self, resources: ExitStack) -> list[int]:
        if local_directory() is None:
            return [device.slot for device in self.devices]
        return resources.enter_context(claimed_cores(self.num_devices))

    def _kill_workers(self) -> None:
        for worker in self._workers:
            worker.kill()
        for actor in self._warm.values():
            ray.kill(actor)
        self._workers.clear()
        self._warm.clear()

    def host(self, device: int) -> str:
        """The IP address at which a device's processes reach one another."""
        return self.devices[device].host

    def elsewhere(self) -> dict[str, Worker[Any]]:
        """A worker on each host but the driver's, by the host's IP address."""
        own = ray.get_runtime_context().get_node_id()
        here = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own)
        by_host = {self.host(worker.device): worker for worker in self._workers}
        return {host: worker for host, worker in by_host.items() if host != here}

    def spawn(
        self, role: str, device: int, worker_class: Callable[_P, _W], *args: _P.args, **kwargs: _P.kwargs
    ) -> Worker[_W]:
        """Make a `worker_class(*args, **kwargs)` in a new process on a device; returns before it is made.

        A device has room for two workers. What the constructor raises is raised by the results of calls.
        """
        live = Counter(worker.device for worker in self._workers)
        assert live[device] < 1 / _SHARE_OF_DEVICE, f"device {device} already has {live[device]} workers"
        actor = self._warm.pop((role, device), None) or self._process(device, worker_class)
        # A GPU's processes need threads beside the one that computes; a core's must not take another device's core.
        started = actor.start.remote(self._cores[device] if self._cores else None, worker_class, args, kwargs)
        worker: Worker[_W] = Worker(role, device, actor, started, concurrent_methods(worker_class), self._logs)
        self._workers.append(worker)
        return worker

    def warm(self, role: str, device: int, worker_class: type, *imported: object) -> None:
        """Start the process of a device's next worker of this role and class; it imports what defines `imported`."""
        actor = self._warm[role, device] = self._process(device, worker_class)
        actor.warm.remote(worker_class, *imported)

    def _process(self, device: int, worker_class: Callable[..., object]) -> Any:
        """A new process on a device, without a worker."""
        assert self._group is not None, "processes start inside the cluster's with block"
        return (
            actor_class(worker_class)
            .options(
                num_cpus=_SHARE_OF_DEVICE,
                num_gpus=_SHARE_OF_DEVICE if self._accelerator == "cuda" else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, self.devices[device].bundle),
                **_runtime_env(),
            )
            .remote()
        )

    def kill(self, worker: Worker[Any]) -> None:
        """End one worker, which makes room on its device for another."""
        self._workers.remove(worker)
        worker.kill()


def _runtime_env() -> dict[str, Any]:
    """The environment of processes that compute; those of a local cluster are born with it."""
    return {"runtime_env": {"env_vars": dict(WORKER_ENVIRONMENT)}} if local_directory() is None else {}


def _bundle(accelerator: Accelerator) -> dict[str, float]:
    return {"CPU": 1.0} if accelerator == "cpu" else {"CPU": 1.0, "GPU": 1.0}


def _require_devices(num_devices: int, accelerator: Accelerator) -> None:
    """Refuse what the cluster can never hold; what others are using at the moment is waited for."""
    capacities = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    present = sum(min(int(capacity.get(resource, 0)) for resource in _bundle(accelerator)) for capacity in capacities)
    if num_devices > present:
        unit = "core" if accelerator == "cpu" else "GPU with a core"
        place = f"the Ray cluster of {len(capacities)} node{'s' * (len(capacities) != 1)}"
        raise _too_few(num_devices, present, unit, place)


def _too_few(asked: int, present: int, unit: str, place: str) -> ValueError:
    return ValueError(
        f"num_devices={asked}, but {place} has {present} (a device is one {unit}): pass num_devices={max(present, 1)} "
        "or less, or join a larger Ray cluster with ray_address (`ray start --head`, then `ray start --address=...`)"
    )


@contextmanager
def _reserve(num_devices: int, accelerator: Accelerator) -> Iterator[PlacementGroup]:
    """One bundle per device, on as few nodes as possible; given back at the end."""
    group = placement_group([_bundle(accelerator)] * num_devices, strategy="PACK")
    try:
        if not group.wait(_PLACEMENT_TIMEOUT_S):
            free = {name: ray.available_resources().get(name, 0.0) for name in _bundle(accelerator)}
            raise ValueError(
                f"num_devices={num_devices}, but for {_PLACEMENT_TIMEOUT_S:.0f} s other jobs have left the Ray cluster "
                f"only {free}: wait for them to end or ask for fewer devices"
            )
        yield group
    finally:
        remove_placement_group(group)


def _devices(group: PlacementGroup) -> tuple[Device, ...]:
    """The bundles in the order of their nodes, so that neighbouring devices are close to each other."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes: Mapping[int, str] = placement_group_table(group)["bundles_to_node_id"]
    in_order = sorted(nodes, key=lambda bundle: (addresses[nodes[bundle]], nodes[bundle], bundle))
    on_host: Counter[str] = Counter()
    devices = []
    for index, bundle in enumerate(in_order):
        host = addresses[nodes[bundle]]
        # Counted by address, for two Ray nodes may share one machine.
        devices.append(Device(index, host, on_host[host], bundle))
        on_host[host] += 1
    return tuple(devices)
