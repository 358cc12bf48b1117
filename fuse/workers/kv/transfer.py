"""How a migrating sample's KV goes from one engine's process to another's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import ray.exceptions
import torch
from torch import Tensor

from fuse.engines.kv_memory import Allocate, Layout
from fuse.workers.weights import WeightsRef, get_state_dict, put_state_dict

_FULL = ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlRef:
    """KV in registered memory of another process: plain data, by which NIXL reads it there.

    agent, metadata: the NIXL agent of that process, and what it says of itself and of this memory.
    address, num_bytes: where the tensors of `layout` lie, dtypes by name. ticket: names this offer, once read, to the
        agent.
    """

    agent: str
    metadata: bytes
    memory: Literal["DRAM", "VRAM"]
    device_id: int
    address: int
    num_bytes: int
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    ticket: bytes


KVRef = WeightsRef | NixlRef
"""KV on its way, as it travels with its sample."""


class KVTransfer(Protocol):
    """Carries KV from its process and into it, beside an engine. Calls must not overlap."""

    @property
    def allocate(self) -> Allocate | None:
        """Where the engine is to write KV that is offered next; None: on the host, as it likes.

        Raises: torch.OutOfMemoryError when the device has no room for it.
        """
        ...

    def offer(self, kv: Sequence[Tensor]) -> KVRef | None:
        """Let another process fetch KV, once; None where there is no room. The tensors are now the carrier's."""
        ...

    def fetch(self, ref: KVRef) -> tuple[Tensor, ...] | None:
        """KV offered elsewhere, of the same dtypes and shapes; None when it is lost with the process that offered it,
        or there is no room for it.

        Only to be read, and, unless it is offered on, to be given back by `release`.
        """
        ...

    def release(self, kv: Sequence[Tensor]) -> None:
        """Nobody reads what was fetched any more; nothing happens if it was offered on."""
        ...

    def recall(self) -> None:
        """Take back what was offered and not fetched, and what was fetched and not released."""
        ...

    def close(self) -> None:
        """Free everything; no further calls but `close`."""
        ...


class ObjectStoreTransfer:
    """Through Ray's object store: a copy into host memory that all processes of a host share, read without another."""

    allocate: Allocate | None = None

    def offer(self, kv: Sequence[Tensor]) -> KVRef | None:
        try:
            return put_state_dict({str(index): tensor for index, tensor in enumerate(kv)})
        except _FULL as error:
            warn_lost(type(error).__name__)
            return None

    def fetch(self, ref: KVRef) -> tuple[Tensor, ...] | None:
        assert isinstance(ref, WeightsRef), "KV was offered through another carrier"
        try:
            return tuple(get_state_dict([ref]).values())
        except (ray.exceptions.ObjectLostError, *_FULL) as error:  # the object was the dead process's own
            warn_lost(type(error).__name__)
            return None

    def release(self, kv: Sequence[Tensor]) -> None:
        pass  # the store counts references

    def recall(self) -> None:
        pass

    def close(self) -> None:
        pass


MakeKVTransfer = Callable[[], KVTransfer]
"""Runs inside the generation worker, once its engine is there."""


def warn_lost(reason: str) -> None:
    """Say that a sample's KV could not be fetched; what to do about it is the worker's business."""
    _logger.warning("KV of a migrating sample is lost (%s): it is computed again from the tokens", reason)


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `str` names so."""
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def named_layout(layout: Layout) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """A layout as plain data."""
    return tuple((str(dtype), tuple(shape)) for dtype, shape in layout)
