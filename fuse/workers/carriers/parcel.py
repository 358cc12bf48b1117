"""A bucket of weights on its way: which tensors lie where in it, and how a receiver finds its memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

BUCKET_BYTES = 128 << 20
"""Most of a run's bucket; a larger tensor, as an embedding may be, has one to itself."""

_ALIGNMENT_BYTES = 256
"""Of every tensor in a bucket; that of CUDA's allocations, and so enough for whatever reads them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a bucket: contiguous, from byte `offset` on."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The tensor in the bucket's `memory`, uint8 [bytes]; a view."""
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


Bucket = tuple[Entry, ...]
"""In order of their offsets."""


def bucket_bytes(bucket: Bucket) -> int:
    """What its memory takes."""
    return bucket[-1].offset + bucket[-1].num_bytes if bucket else 0


def cut(shapes: Mapping[str, torch.Size], dtype: torch.dtype, most_bytes: int) -> list[Bucket]:
    """Tensors of this type in buckets of at most `most_bytes`, in their order; a larger tensor has one to itself."""
    buckets: list[Bucket] = []
    entries: list[Entry] = []
    offset = 0
    for name, shape in shapes.items():
        entry = Entry(name, shape, dtype, offset)
        if entries and offset + entry.num_bytes > most_bytes:
            buckets.append(tuple(entries))
            entries, entry = [], Entry(name, shape, dtype, 0)
        entries.append(entry)
        offset = -(-(entry.offset + entry.num_bytes) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return [*buckets, tuple(entries)] if entries else buckets


class Address(Protocol):
    """Memory of another process, as plain data."""

    def open(self) -> Tensor:
        """It, uint8 [bytes], only to be read.

        Host memory stays as it is for whoever keeps it. A device's is good until the sender is told that all have done.
        """
        ...


class LocalCarrier(Protocol):
    """The sender's side of memory that other processes on this host reach. One bucket at a time."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Memory for the next bucket, uint8 [num_bytes], to be written. Pre: the last one was released."""
        ...

    def offer(self) -> Address:
        """Where others find that memory, now that it is written."""
        ...

    def release(self) -> None:
        """All receivers have done with it. Nothing happens where there is none."""
        ...

    def close(self) -> None:
        """Free all memory that is held for further buckets, and the last one's."""
        ...


@dataclass(frozen=True, slots=True)
class Parcel:
    """A bucket as a receiver gets it. address: None where it comes by the broadcast of `group`."""

    bucket: Bucket
    address: Address | None
    group: str | None = None

    def tensors(self, memory: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The bucket's tensors by name: views of its memory."""
        return ((entry.name, entry.of(memory)) for entry in self.bucket)
