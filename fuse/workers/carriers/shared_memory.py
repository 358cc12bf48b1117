"""Weights between processes of one host, in pages that all of them see: written once, read without a copy.

A bucket is a file without a name (memfd), which a receiver maps through the sender's entry in /proc. It is gone with
the last process that has it open or mapped, so that none is left behind whoever dies when, and a limit of /dev/shm does
not concern it. Linux only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedPages:
    """An open file of a process of this host and user."""

    process_id: int
    descriptor: int
    num_bytes: int

    def open(self) -> Tensor:
        """As of `Address`. Pages live as long as a view of them; what is written to them is seen here alone."""
        return self._map(shared=False)

    def open_to_write(self) -> Tensor:
        """What is written is seen by all who open the file then or later."""
        return self._map(shared=True)

    def _map(self, *, shared: bool) -> Tensor:
        path = f"/proc/{self.process_id}/fd/{self.descriptor}"
        size = max(self.num_bytes, 1)  # none cannot be mapped
        return torch.from_file(path, shared=shared, size=size, dtype=torch.uint8)[: self.num_bytes]


class SharedMemoryCarrier:
    """A `LocalCarrier` in host memory. What a receiver keeps is never written again: every bucket has new pages."""

    def __init__(self) -> None:
        self._offered: SharedPages | None = None

    def allocate(self, num_bytes: int) -> Tensor:
        assert self._offered is None, "the last bucket was not released"
        file = os.memfd_create("fuse-weights", os.MFD_CLOEXEC)
        self._offered = SharedPages(os.getpid(), file, num_bytes)
        os.ftruncate(file, max(num_bytes, 1))
        return self._offered.open_to_write()

    def offer(self) -> SharedPages:
        assert self._offered is not None, "no bucket was allocated"
        return self._offered

    def release(self) -> None:
        if self._offered is not None:
            os.close(self._offered.descriptor)
            self._offered = None

    def close(self) -> None:
        self.release()
