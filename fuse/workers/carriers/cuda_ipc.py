"""Weights between processes of one host in the sender's device memory, which the others map. NEVER RUN YET: no GPU.

By `torch.multiprocessing.reductions.reduce_tensor` and what it returns, the documented way to hand a CUDA tensor to
another process. Under Ray a process sees its own GPU only, as device 0. The handle can be opened all the same: the
driver maps memory of another GPU of the host into the address space of the one that is current, with peer access,
which GPUs with NVLink have, and most others on one PCIe switch (CUDA Runtime API, `cudaIpcOpenMemHandle`, flag
`cudaIpcMemLazyEnablePeerAccess`, which torch sets). Where two GPUs have none, opening raises CUDA's error.

Two rules of CUDA's: a process must not open a handle of its own, and memory must outlive whoever has it open.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DevicePages:
    """Device memory of a process of this host. rebuild, arguments: as `reduce_tensor` gives them."""

    process_id: int
    rebuild: Callable[..., Tensor]
    arguments: tuple[Any, ...]

    def open(self) -> Tensor:
        if self.process_id == os.getpid():
            return CudaIpcCarrier.own_memory()
        return self.rebuild(*self.arguments)


class CudaIpcCarrier:
    """A `LocalCarrier` in device memory: one buffer, used again for every bucket until `close`."""

    _own: ClassVar[Tensor | None] = None
    """What this process offers, for receivers in the same one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer: Tensor | None = None

    @classmethod
    def own_memory(cls) -> Tensor:
        assert cls._own is not None, "this process offers nothing"
        return cls._own

    def allocate(self, num_bytes: int) -> Tensor:
        if self._buffer is None or self._buffer.numel() < num_bytes:
            self._buffer = None  # before the larger one is there
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        CudaIpcCarrier._own = self._buffer[:num_bytes]
        return CudaIpcCarrier._own

    def offer(self) -> DevicePages:
        from torch.multiprocessing.reductions import reduce_tensor

        memory = self.own_memory()
        torch.cuda.current_stream(self._device).synchronize()  # the bucket is written
        rebuild, arguments = reduce_tensor(memory)
        return DevicePages(os.getpid(), rebuild, arguments)

    def release(self) -> None:
        CudaIpcCarrier._own = None
        if self._buffer is not None:
            torch.cuda.ipc_collect()  # receivers have closed what they opened

    def close(self) -> None:
        self.release()
        self._buffer = None
