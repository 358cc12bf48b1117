"""The world of the model workers, and the groups their pipelines and optimizers talk in, over torch.distributed.

Every function that opens groups must be called on every rank with the same arguments in the same order: torch
creates a group on all ranks or not at all. Each group carries one message as soon as it is open, before the next one
opens: NCCL sets a connection up by its first message, and blocks both ends' hosts meanwhile. As all ranks come to the
groups in one order, none waits at a group for a rank that waits for it at another. What is sent later comes in one
order on all ranks too, messages in that of `fuse.intrastage.message_order`, sums in that of `ModelOptimizer`.

With tensor parallelism of size t, a stage is on t devices that each hold a part of its matrices: what placements and
schedules call rank r is devices r * t to r * t + t - 1, in the world's numbering. Device d is in lane d % t. Messages
between stages stay within a lane, as all devices of a stage compute the same hidden states; so do sums of gradients.
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore

_NCCL_POLL_S = 20e-6
_NCCL_MOST_CTAS = 2
"""Thread blocks of a kernel that moves a message, each of which holds a multiprocessor until its peer's comes."""
_NCCL_ENVIRONMENT = {
    # Streams share no hardware queue, in which a kernel that waits would hold up others, as long as they are not more.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    # Messages of a group are meant to follow one another: it carries those of one pair of stages in one direction.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
}


class CommunicationError(RuntimeError):
    """A peer died or did not answer in time; the message names the rank, the operation and the pipeline."""


def serve_store(host: str, timeout_s: float) -> TCPStore:
    """Open the store at which the ranks meet, on a port the system picks (`.port`). Rank 0 calls this, and keeps it.

    It asks nobody who they are, so it listens at `host`'s address alone: by itself it would on all of this machine's.
    """
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen()
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def connect(
    rank: int, world_size: int, store_host: str, store_port: int, device: torch.device, timeout_s: float
) -> None:
    """Join the world; returns when all `world_size` ranks have. GPUs talk by NCCL, CPUs by gloo.

    Raises: CommunicationError when not all of them come within `timeout_s`.
    """
    if _is_loopback(store_host):
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    timeout = timedelta(seconds=timeout_s)
    with naming(f"rank {rank}: joining the world of {world_size} model workers at {store_host}:{store_port}"):
        store = TCPStore(store_host, store_port, is_master=False, timeout=timeout)
        bound = None
        if device.type == "cuda":
            for variable, value in _NCCL_ENVIRONMENT.items():
                os.environ.setdefault(variable, value)
            # Communicators of a bound device are set up as groups open, and serve collectives and messages alike.
            bound = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(bound)  # where torch.distributed puts what it sends of its own
        backend = "gloo" if bound is None else "nccl"
        dist.init_process_group(backend, None, timeout, world_size, rank, store, device_id=bound)
    _set_up_collectives(None, "the world", timeout_s)


def disconnect() -> None:
    """Leave the world, if connected."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Transfer:
    """A message on its way; the tensor must not be touched before `wait` returns."""

    tensor: Tensor
    description: str
    _work: dist.Work
    _deadline_after_s: float

    def wait(self) -> Tensor:
        """The tensor, once it is sent or received.

        Raises: CommunicationError when that does not happen in time.
        """
        with naming(self.description):
            if self.tensor.is_cuda:  # here Work.wait only orders CUDA streams: it neither blocks nor times out
                deadline_s = time.monotonic() + self._deadline_after_s
                while not self._work.is_completed():
                    if time.monotonic() > deadline_s:
                        raise CommunicationError(f"no answer within {self._deadline_after_s:g} s")
                    time.sleep(_NCCL_POLL_S)
            self._work.wait()
        return self.tensor


class Communicator:
    """One pipeline's messages in one direction: forward carries hidden states, backward their gradients.

    Each pair of neighbouring stages has a two-rank group of its own, so messages between two stages arrive in the
    order sent, and no message waits behind another pair's. (NCCL matches by order alone; gloo also by tag.)
    """

    def __init__(self, pipeline: str, ranks: Sequence[int], *, step: int, timeout_s: float) -> None:
        self._pipeline, self._ranks, self._step, self._timeout_s = pipeline, tuple(ranks), step, timeout_s
        self._groups: dict[int, dist.ProcessGroup] = {}
        for stage in range(len(ranks)):
            if 0 <= stage + step < len(ranks) and ranks[stage] != ranks[stage + step]:
                pair = ranks[stage], ranks[stage + step]
                self._groups[stage] = _open_group(pair, timeout_s, _message_options(timeout_s))
                self._set_up(stage)

    def send(self, tensor: Tensor, *, stage: int, micro_batch: int, op: str) -> Transfer:
        """Start sending from `stage` to its neighbour in this direction; `op` names the result in errors."""
        peer = self._ranks[stage + self._step]
        description = f"{self._origin(stage)}: sending the result of {op} to rank {peer}"
        tensor = tensor.contiguous()
        with naming(description):
            work = dist.isend(tensor, dst=peer, group=self._groups[stage], tag=micro_batch)
        assert work is not None
        return Transfer(tensor, description, work, self._timeout_s)

    def receive(self, buffer: Tensor, *, stage: int, micro_batch: int, op: str) -> Transfer:
        """Start receiving into `buffer` at `stage` from its neighbour in this direction; `op` is what waits for it."""
        source = stage - self._step
        peer = self._ranks[source]
        description = f"{self._origin(stage)}: waiting for the input of {op} from rank {peer}"
        with naming(description):
            work = dist.irecv(buffer, src=peer, group=self._groups[source], tag=micro_batch)
        assert work is not None
        return Transfer(buffer, description, work, self._timeout_s)

    def _set_up(self, stage: int) -> None:
        """Have one message go through from `stage` to its neighbour in this direction."""
        if dist.get_rank() == self._ranks[stage]:
            self.send(_element(), stage=stage, micro_batch=0, op="setting up").wait()
        elif dist.get_rank() == self._ranks[stage + self._step]:
            self.receive(_element(), stage=stage + self._step, micro_batch=0, op="setting up").wait()

    def _origin(self, stage: int) -> str:
        return f"rank {self._ranks[stage]}, pipeline {self._pipeline}"


@dataclass(frozen=True, slots=True)
class PipelineCommunicators:
    """A pipeline's communicators, one per direction."""

    forward: Communicator
    backward: Communicator


def open_tensor_group(tensor_parallel_size: int, timeout_s: float) -> dist.ProcessGroup | None:
    """The devices that share matrices with this one, for all of its stages; None when it shares none.

    Raises: ValueError when the world does not divide into groups of that size.
    """
    world_size = dist.get_world_size()
    if tensor_parallel_size < 1 or world_size % tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} does not divide the {world_size} devices: choose a divisor"
        )
    if tensor_parallel_size == 1:
        return None
    groups = [
        _open_collectives(_devices(rank, tensor_parallel_size), timeout_s)
        for rank in range(world_size // tensor_parallel_size)
    ]
    return groups[dist.get_rank() // tensor_parallel_size]


def open_pipelines(
    pipelines: Sequence[tuple[str, Sequence[int]]], timeout_s: float, tensor_parallel_size: int = 1
) -> tuple[PipelineCommunicators, ...]:
    """Communicators of every pipeline within this device's lane, given its name and the rank of each of its stages.

    timeout_s: how long one message may take from the moment a rank needs it; more than any wait in a healthy step.
    """
    lanes = [
        [(name, [_devices(rank, tensor_parallel_size)[lane] for rank in ranks]) for name, ranks in pipelines]
        for lane in range(tensor_parallel_size)
    ]
    opened = [
        tuple(
            PipelineCommunicators(
                Communicator(name, devices, step=1, timeout_s=timeout_s),
                Communicator(name, devices, step=-1, timeout_s=timeout_s),
            )
            for name, devices in lane
        )
        for lane in lanes
    ]
    return opened[_lane(tensor_parallel_size)]


@dataclass(frozen=True, slots=True)
class ModelGroups:
    """The groups in which the replicas and stages of one model agree on a step, as far as this device is in them.

    replicas: by stage, the devices of the lane that hold copies of it; none where one device has all.
    ends: by replica, its first and last device in the lane, which both hold a tied embedding; none where they are one.
    members: by replica, all its devices of all lanes; none where it is one device.
    lane: this device's, 0 without tensor parallelism.
    """

    num_replicas: int
    num_stages: int
    replicas: Mapping[int, dist.ProcessGroup]
    ends: Mapping[int, dist.ProcessGroup]
    members: Mapping[int, dist.ProcessGroup]
    lane: int = 0


def open_model(replicas: Sequence[Sequence[int]], timeout_s: float, tensor_parallel_size: int = 1) -> ModelGroups:
    """Groups of a model whose replica r has stage s on rank `replicas[r][s]`.

    Raises: ValueError when replicas differ in their number of stages, or two have all stages on the same ranks.
    """
    num_stages = len(replicas[0])
    if any(len(ranks) != num_stages for ranks in replicas):
        raise ValueError(f"replicas {list(replicas)} differ in their number of stages: cut every replica alike")
    if len({tuple(ranks) for ranks in replicas}) < len(replicas):
        raise ValueError(f"two of the replicas {list(replicas)} have the same ranks: put each on ranks of its own")
    holders = list(zip(*replicas, strict=True))
    mine = dist.get_rank()

    def opened(rank_lists: Sequence[Sequence[int]], *, across_lanes: bool = False) -> dict[int, dist.ProcessGroup]:
        groups: dict[int, dist.ProcessGroup] = {}
        for index, ranks in enumerate(rank_lists):
            lanes = list(zip(*(_devices(rank, tensor_parallel_size) for rank in dict.fromkeys(ranks)), strict=True))
            for devices in [tuple(itertools.chain(*lanes))] if across_lanes else lanes:
                if len(devices) > 1:
                    group = _open_collectives(devices, timeout_s)
                    if mine in devices:
                        groups[index] = group
        return groups

    return ModelGroups(
        len(replicas),
        num_stages,
        replicas=opened(holders),
        ends=opened([(ranks[0], ranks[-1]) for ranks in replicas]),
        members=opened(replicas, across_lanes=True),
        lane=_lane(tensor_parallel_size),
    )


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None, what: str) -> None:
    """Sum over the group, or all, in place and with the same bits on every rank; `what` is named in errors."""
    with naming(f"rank {dist.get_rank()}: summing {what}"):
        dist.all_reduce(tensor, group=group)


def all_gather_floats(value: float, group: dist.ProcessGroup, device: torch.device, what: str) -> list[float]:
    """Every rank's value."""
    own = torch.tensor([value], dtype=torch.float64, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    with naming(f"rank {dist.get_rank()}: gathering {what}"):
        dist.all_gather(gathered, own, group=group)
    return [float(one) for one in gathered]


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turn a failure of torch.distributed inside the body into one that says what was being done."""
    try:
        yield
    except RuntimeError as error:  # what torch raises for dead peers and timeouts, on every backend
        raise CommunicationError(f"{what} failed: {error}") from error


def _devices(rank: int, tensor_parallel_size: int) -> range:
    """The devices that are a rank of placements and schedules."""
    return range(rank * tensor_parallel_size, (rank + 1) * tensor_parallel_size)


def _lane(tensor_parallel_size: int) -> int:
    return dist.get_rank() % tensor_parallel_size


def _open_collectives(ranks: Sequence[int], timeout_s: float) -> dist.ProcessGroup:
    group = _open_group(ranks, timeout_s)
    if dist.get_rank() in ranks:
        _set_up_collectives(group, f"the group of devices {', '.join(map(str, ranks))}", timeout_s)
    return group


def _set_up_collectives(group: dist.ProcessGroup | None, what: str, timeout_s: float) -> None:
    """Have one sum go through a group that this device is in; None for that of all."""
    description = f"rank {dist.get_rank()}: setting up {what}"
    element = _element()
    with naming(description):
        work = dist.all_reduce(element, group=group, async_op=True)
    Transfer(element, description, work, timeout_s).wait()


def _open_group(ranks: Sequence[int], timeout_s: float, options: Any = None) -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(list(ranks), timedelta(seconds=timeout_s), pg_options=options)
    return group


def _message_options(timeout_s: float) -> Any:
    """Of a group that carries messages; None for those that gloo has of itself."""
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.config.max_ctas = _NCCL_MOST_CTAS
    return options


def _element() -> Tensor:
    """Something to send, on this rank's device."""
    world = dist.group.WORLD
    assert world is not None
    return torch.zeros(1, device=world.bound_device_id or "cpu")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
