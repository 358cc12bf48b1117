"""Weights to processes on other hosts: a broadcast from the sender to all of them at once, by NCCL between GPUs (never
run yet: no GPU) and by gloo between CPUs.

The group is nobody's default group: vLLM owns that of its process. Its backend is torch's own class, made directly.
A member that dies breaks the group; the others' calls then fail in time, or are ended by `abort`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore

from fuse.intrastage.communication import naming

_SENDER = 0


class BroadcastGroup:
    """This process's place in a group, whose rank 0 sends. All members open it at once.

    store: host and port of the store at which they meet. host: the address at which this process is reached.

    Raises: CommunicationError, from every method, when a member is lost or does not come in time.
    """

    def __init__(
        self,
        name: str,
        store: tuple[str, int],
        host: str,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.name, self._device = name, device
        self._sent: tuple[dist.Work, Tensor] | None = None
        timeout = timedelta(seconds=timeout_s)
        with naming(f"weights: rank {rank} of {size} joins the broadcast of {name} at {store[0]}:{store[1]}"):
            meeting = dist.PrefixStore(name, TCPStore(*store, is_master=False, timeout=timeout))
            self._group = (
                _nccl(meeting, rank, size, timeout)
                if device.type == "cuda"
                else _gloo(meeting, rank, size, timeout, host)
            )
            self._broadcast(torch.zeros(1, dtype=torch.uint8, device=device)).wait()  # NCCL connects by the first
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def send(self, memory: Tensor) -> None:
        """Start sending, uint8 [bytes]; it must not be touched before `finish`."""
        with naming(f"weights: sending by {self.name}"):
            self._sent = self._broadcast(memory), memory

    def finish(self) -> None:
        """Wait until what was sent last has left."""
        sent, self._sent = self._sent, None
        if sent is not None:
            with naming(f"weights: sending by {self.name}"):
                sent[0].wait()

    def receive(self, num_bytes: int) -> Tensor:
        """What rank 0 sends next, uint8 [num_bytes] in memory of its own."""
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        with naming(f"weights: receiving by {self.name}"):
            self._broadcast(memory).wait()
        return memory

    def abort(self) -> None:
        """Leave, whatever is under way."""
        self._sent = None
        self._group.abort()

    def _broadcast(self, memory: Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = _SENDER, 0
        work: dist.Work = self._group.broadcast([memory], options)
        return work


# The backends' classes have fewer types than members.


def _nccl(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    backend: Any = dist.ProcessGroupNCCL
    options = backend.Options()
    options._timeout = timeout
    return backend(store, rank, size, options)


def _gloo(store: dist.Store, rank: int, size: int, timeout: timedelta, host: str) -> Any:
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._timeout = timeout
    options._devices = [backend.create_device(hostname=host)]  # it listens at this address alone
    return backend(store, rank, size, options)
