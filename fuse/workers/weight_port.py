"""Where weights leave a process, and enter one, a bucket at a time."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fuse.intrastage.communication import CommunicationError
from fuse.workers.carriers.broadcast import BroadcastGroup
from fuse.workers.carriers.cuda_ipc import CudaIpcCarrier
from fuse.workers.carriers.parcel import Bucket, LocalCarrier, Parcel, bucket_bytes, cut
from fuse.workers.carriers.shared_memory import SharedMemoryCarrier

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A process's place in a broadcast group: rank 0 sends.

    store: host and port of where the members meet. host: the address at which this one is reached.
    """

    group: str
    store: tuple[str, int]
    host: str
    rank: int
    size: int
    device: str
    timeout_s: float


class WeightPort:
    """What a process sends and receives weights through."""

    def __init__(self) -> None:
        self._groups: dict[str, BroadcastGroup] = {}

    def join(self, own: Membership) -> None:
        """Become a member of a group; all members do at once."""
        device = torch.device(own.device)
        self._groups[own.group] = BroadcastGroup(
            own.group, own.store, own.host, own.rank, own.size, device, own.timeout_s
        )

    def leave(self, name: str) -> None:
        """Leave a group, whatever is under way, if this process is in it."""
        if (group := self._groups.pop(name, None)) is not None:
            group.abort()

    def group(self, name: str | None) -> BroadcastGroup | None:
        """One that this process is in."""
        return None if name is None else self._groups.get(name)

    def receive(self, parcels: Iterable[Parcel]) -> Iterator[tuple[str, Tensor]]:
        """Their tensors by name. Those of a device are gone when the last one of their parcel has been used.

        Raises: CommunicationError when they come by broadcast and do not arrive.
        """
        for parcel in parcels:
            if parcel.address is not None:
                memory = parcel.address.open()
            else:
                group = self.group(parcel.group)
                assert group is not None, f"this process is not in {parcel.group}"
                memory = group.receive(bucket_bytes(parcel.bucket))
            yield from parcel.tensors(memory)
            if memory.is_cuda:
                torch.cuda.current_stream(memory.device).synchronize()  # the sender may write there again


class WeightSender:
    """Sends weights from this process in buckets, of which there is one at a time.

    shapes: by name. tensors: those of them, in that order, each read when there is room for it. most_bytes: of a
    bucket of several. is_silent: reads as others do, with whom the tensors are made, and sends nothing.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        tensors: Iterator[tuple[str, Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        most_bytes: int,
        is_silent: bool,
    ) -> None:
        self._buckets = deque(cut(shapes, dtype, most_bytes))
        self._tensors = tensors
        self._group: BroadcastGroup | None = None  # of the last bucket
        self._carrier: LocalCarrier | None = None
        if not is_silent:
            self._carrier = CudaIpcCarrier(device) if device.type == "cuda" else SharedMemoryCarrier()

    def next(self, group: BroadcastGroup | None) -> Parcel | None:
        """The next bucket, which is broadcast to the group as well; None after the last, and of one that is silent.

        Pre: whoever got the one before has done with it.
        """
        self._end_last()
        bucket = self._buckets.popleft() if self._buckets else ()
        if self._carrier is None:
            for _ in bucket:
                next(self._tensors)
            return None
        if not bucket:
            self._carrier.close()
            return None
        memory = self._carrier.allocate(bucket_bytes(bucket))
        self._write(bucket, memory)
        address = self._carrier.offer()
        if group is not None:
            group.send(memory)
            self._group = group
        return Parcel(bucket, address)

    def close(self) -> None:
        """Free what the last bucket holds, whoever still reads it."""
        self._end_last()
        if self._carrier is not None:
            self._carrier.close()

    def _write(self, bucket: Bucket, memory: Tensor) -> None:
        for entry in bucket:
            name, tensor = next(self._tensors)
            assert (name, tensor.shape) == (entry.name, entry.shape), f"{name} came in place of {entry.name}"
            entry.of(memory).copy_(tensor)
            del tensor  # before the next one is made

    def _end_last(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            try:
                group.finish()
            except CommunicationError as error:  # those who did not get it say so themselves
                _logger.warning("%s", error)
        if self._carrier is not None:
            self._carrier.release()
