"""Devices and the workers on them: plain Python objects in processes of their own, called through Ray.

A device is one core, or one GPU with a core beside it: one bundle of a Ray placement group, which its workers share.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fuse.workers.errors import WorkerError, cause_of, dead_process_id
from fuse.workers.ray_session import WORKER_ENVIRONMENT, joined_cluster, local_cluster, local_directory

Accelerator = Literal["cpu", "cuda"]

_SHARE_OF_DEVICE = 0.5
_PLACEMENT_TIMEOUT_S = 60.0
_NUM_LAST_LINES = 40


@dataclass(frozen=True, slots=True)
class Device:
    """Where a device is: `host` is its node's IP address; `slot` counts the run's devices on that host."""

    index: int
    host: str
    slot: int
    bundle: int


class _Process:
    """A worker's process: makes the worker and passes calls on to it."""

    def warm(self, *imported: object) -> None:
        """Does nothing but that arguments are unpickled, and so the modules imported that define them."""

    def start(self, core: int | None, worker_class: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Pin the process, make the worker, return the process id. `core` counts the cores available, and wraps."""
        if core is not None:
            available = sorted(os.sched_getaffinity(0))
            _pin(available[core % len(available)])
        self._worker = worker_class(*args, **kwargs)
        return os.getpid()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._worker, method)(*args, **kwargs)


def _pin(core: int) -> None:
    """Keep this process to a core: all its threads, and those that they start meanwhile."""
    pinned: set[str] = set()
    while unpinned := {*os.listdir("/proc/self/task")} - pinned:
        for thread in unpinned:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), {core})
        pinned |= unpinned


class _ConcurrentProcess(_Process):
    """A worker's process in which one more call may run beside the others."""

    def __init__(self) -> None:
        self._ended_start = threading.Event()

    def start(self, core: int | None, worker_class: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        try:
            return super().start(core, worker_class, args, kwargs)
        finally:
            self._ended_start.set()

    @ray.method(concurrency_group="beside")
    def call_beside(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._ended_start.wait()
        return getattr(self._worker, method)(*args, **kwargs)


class Worker:
    """An object living in a process on a device.

    Calls run one at a time in order. Methods that the class names in `concurrent_methods` may block: they run, one at
    a time, beside the others.
    """

    def __init__(
        self,
        role: str,
        device: int,
        actor: Any,
        started: ray.ObjectRef[int],
        concurrent: frozenset[str],
        logs: Path | None,
    ) -> None:
        self.role = role
        self.device = device
        self._actor = actor
        self._started = started
        self._concurrent = concurrent
        self._logs = logs

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future:
        """Call a method of the object; arguments and result are pickled, `ray.ObjectRef` arguments are resolved."""
        entry = self._actor.call_beside if method in self._concurrent else self._actor.call
        return Future(self, entry.remote(method, *args, **kwargs))

    def wait_started(self) -> None:
        """Wait until the worker is made. Raises: WorkerError when it could not be."""
        self._get(self._started)

    @property
    def process_id(self) -> int:
        """The worker's process id on its host; waits until the worker is made."""
        return int(self._get(self._started))

    def kill(self) -> None:
        """End the process at once; its pending calls fail. A second time does nothing."""
        ray.kill(self._actor)

    def _get(self, reference: ray.ObjectRef[Any]) -> Any:
        try:
            return ray.get(reference)
        except RayError as error:
            raise self._failure(error) from error

    def _failure(self, error: RayError) -> WorkerError:
        """Say why a call failed; when the worker could not be made, that is the reason for all that follows."""
        reason = error
        try:
            ray.get(self._started)
        except RayError as first:
            reason = first
        if self._logs is not None:
            for line in _last_lines(self._logs, dead_process_id(reason)):
                error.add_note(line)
        return WorkerError(self.device, self.role, cause_of(reason), is_death=isinstance(reason, RayActorError))


def _last_lines(logs: Path, process_id: int | None) -> list[str]:
    """The end of what a process wrote to stderr, which is where a crash of native code reports itself."""
    lines = [line for log in logs.glob(f"session_latest/logs/worker-*-{process_id}.err") for line in _lines(log)]
    return [line for line in lines if not line.startswith(":")][-_NUM_LAST_LINES:]  # ":" marks Ray's own lines


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()


class Future:
    """The result of a call that may not have ended."""

    __slots__ = ("_reference", "worker")

    def __init__(self, worker: Worker, reference: ray.ObjectRef[Any]) -> None:
        self.worker = worker
        self._reference = reference

    def result(self) -> Any:
        """Wait for the call to end. Raises: WorkerError when it raised or its process died."""
        return self.worker._get(self._reference)


def wait_any(futures: Sequence[Future], timeout_s: float | None = None) -> tuple[Future, Any]:
    """Wait until one of the calls ends; returns it and its result.

    Raises:
        WorkerError: that call raised or its process died.
        TimeoutError: none ended in time.
    """
    by_reference = {future._reference: future for future in futures}
    ended, _ = ray.wait(list(by_reference), num_returns=1, timeout=timeout_s)
    if not ended:
        raise TimeoutError(f"none of {len(futures)} calls ended within {timeout_s} s")
    return by_reference[ended[0]], by_reference[ended[0]].result()


def wait_ended(futures: Sequence[Future]) -> list[Future]:
    """Wait until at least one of the calls has ended, by whatever end; returns all that have, in order of the calls."""
    by_reference = {future._reference: future for future in futures}
    ray.wait(list(by_reference), num_returns=1)
    ended, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)
    done = set(ended)
    return [future for reference, future in by_reference.items() if reference in done]


def gather(futures: Sequence[Future]) -> list[Any]:
    """Wait for all calls and return their results in order.

    Raises:
        WorkerError: at the first call that raised or whose process died, without waiting for the others, which may
            be stuck waiting for it.
    """
    pending = {future._reference: index for index, future in enumerate(futures)}
    results: list[Any] = [None] * len(futures)
    while pending:
        ray.wait(list(pending), num_returns=1)
        ended, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        for reference in ended:
            index = pending.pop(reference)
            results[index] = futures[index].result()
    return results


class Cluster:
    """`num_devices` devices and the workers spawned on them, for the length of a `with` block.

    Without `ray_address` a private cluster starts on this machine and stops with the block, unless this process
    already uses Ray, which is then used and left running. With it, the cluster there is joined ("host:port" or
    "auto"). Leaving the block, by whatever exception, ends every worker.

    Raises:
        ValueError: on entry, when there are fewer devices than asked for or nothing answers at the address.
    """

    def __init__(self, num_devices: int, *, ray_address: str | None = None, accelerator: Accelerator = "cpu") -> None:
        if num_devices < 1:
            raise ValueError(f"num_devices={num_devices}: a run needs at least one device")
        if accelerator not in ("cpu", "cuda"):
            raise ValueError(f"accelerator={accelerator!r} is unknown: choose 'cpu' or 'cuda'")
        self.num_devices = num_devices
        self.devices: tuple[Device, ...] = ()
        self._ray_address = ray_address
        self._accelerator = accelerator
        self._workers: list[Worker] = []
        self._warm: dict[tuple[str, int], Any] = {}  # actors that have no worker yet
        self._logs: Path | None = None
        self._group: PlacementGroup | None = None
        self._resources = ExitStack()

    def __enter__(self) -> Cluster:
        with ExitStack() as resources:
            self._connect(resources)
            _require_devices(self.num_devices, self._accelerator)
            self._group = resources.enter_context(_reserve(self.num_devices, self._accelerator))
            self.devices = _devices(self._group)
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
            resources.enter_context(local_cluster(self.num_devices))
        self._logs = local_directory()

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

    def spawn(
        self,
        role: str,
        device: int,
        worker_class: type,
        *args: Any,
        environment: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Worker:
        """Make a `worker_class(*args, **kwargs)` in a new process on a device; returns before it is made.

        A device has room for two workers. `environment` is set before the process imports anything. What the
        constructor raises is raised by the results of calls.
        """
        place = self.devices[device]
        live = Counter(worker.device for worker in self._workers)
        assert live[device] < 1 / _SHARE_OF_DEVICE, f"device {device} already has {live[device]} workers"
        actor = self._warm.pop((role, device), None) or self._process(device, worker_class, environment or {})
        # A GPU's processes need threads beside the one that computes; a core's must not take another device's core.
        core = place.slot if self._accelerator == "cpu" else None
        started = actor.start.remote(core, worker_class, args, kwargs)
        worker = Worker(role, device, actor, started, _concurrent(worker_class), self._logs)
        self._workers.append(worker)
        return worker

    def warm(self, role: str, device: int, worker_class: type, *imported: object) -> None:
        """Start the process of a device's next worker of this role and class; it imports what defines `imported`."""
        actor = self._warm[role, device] = self._process(device, worker_class, {})
        actor.warm.remote(worker_class, *imported)

    def _process(self, device: int, worker_class: type, environment: Mapping[str, str]) -> Any:
        """A new process on a device, without a worker."""
        assert self._group is not None, "processes start inside the cluster's with block"
        # Any: Ray's types know neither concurrency groups nor options of a class chosen at run time.
        remote: Any = ray.remote
        is_concurrent = bool(_concurrent(worker_class))
        actor_class = (
            remote(concurrency_groups={"beside": 1})(_ConcurrentProcess) if is_concurrent else remote(_Process)
        )
        return actor_class.options(
            num_cpus=_SHARE_OF_DEVICE,
            num_gpus=_SHARE_OF_DEVICE if self._accelerator == "cuda" else 0,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, self.devices[device].bundle),
            **_runtime_env(environment),
        ).remote()

    def kill(self, worker: Worker) -> None:
        """End one worker, which makes room on its device for another."""
        self._workers.remove(worker)
        worker.kill()


def _concurrent(worker_class: type) -> frozenset[str]:
    return frozenset(getattr(worker_class, "concurrent_methods", ()))


def _runtime_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """Of a process with these variables beside the usual ones, which those of a local cluster are born with."""
    is_needed = environment or local_directory() is None
    return {"runtime_env": {"env_vars": {**WORKER_ENVIRONMENT, **environment}}} if is_needed else {}


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
