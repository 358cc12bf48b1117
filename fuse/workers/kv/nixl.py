"""KV from one engine's memory to another's, by NIXL: over NVLink or RDMA between GPUs, through UCX between CPUs.

The one side writes a sample's KV into a piece of registered memory on its own device and sends along where that is; the
other side reads it into such memory of its own and notifies the first one, which then may use its memory again. No copy
goes through the host of a GPU. The code for CPUs and GPUs is the same, but has been run on CPUs only.

Registration takes long, so memory stays registered until the end. A piece has a power of two of bytes, and there are as
many as were ever needed at once.

On CPUs the other side reads through the kernel (cross-memory attach) where the system permits that, else over TCP.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nixl import _bindings as nixl
from torch import Tensor

from fuse.engines import kv_memory
from fuse.workers.kv.transfer import KVRef, NixlRef, dtype_named, named_layout, warn_lost

_LEAST_BYTES = 1 << 16
_PATIENCE_S = 10.0
"""For a process that does not answer, beside the time for its bytes at the lowest speed."""
_PATIENCE_AGAIN_S = 0.5
"""For one that did not answer the last time."""
_LEAST_BYTES_PER_S = 1e8
_POLL_S = 1e-4
_PROGRESS_US = 10_000
"""NIXL's thread wakes up at events, and after so long. Its Python interface leaves that at 0, and the thread spins."""

_NixlError = tuple(kind for kind in vars(nixl).values() if isinstance(kind, type) and issubclass(kind, Exception))


@dataclass(slots=True, eq=False)
class _Piece:
    """Registered memory, uint8 [power of two], and how others get at it."""

    memory: Tensor
    registration: Any
    metadata: bytes

    @property
    def address(self) -> int:
        return self.memory.data_ptr()


class NixlTransfer:
    """A `KVTransfer` between processes whose engines are on devices of one kind.

    device: the engine's, where all memory is. On a GPU it is memory of torch's allocator, which must not be set to
        expandable segments: those cannot be registered.
    is_local: no process on another host takes part: listen on loopback only, unless UCX_NET_DEVICES says where.
    """

    def __init__(self, device: torch.device, *, is_local: bool) -> None:
        if is_local:
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _PROGRESS_US
        config.useListenThread = config.captureTelemetry = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        self._device = device
        self._memory: Literal["DRAM", "VRAM"] = "VRAM" if device.type == "cuda" else "DRAM"
        self._name = uuid.uuid4().hex
        self._agent: Any = nixl.nixlAgent(self._name, config)
        self._agent.createBackend("UCX", {})
        self._pieces: list[_Piece] = []
        self._free: list[_Piece] = []
        self._held: dict[int, _Piece] = {}  # by address: an engine writes there, or reads what was fetched
        self._offered: dict[bytes, _Piece] = {}  # by ticket
        self._num_offers = 0
        self._known: set[tuple[str, bytes]] = set()  # of other agents, with what they said of themselves
        self._silent: set[str] = set()  # of those, who did not answer

    @property
    def num_offered(self) -> int:
        """Offers that were not fetched yet, as far as is known."""
        self._reclaim()
        return len(self._offered)

    def allocate(self, num_bytes: int) -> Tensor:
        piece = self._take(num_bytes)
        self._held[piece.address] = piece
        return piece.memory[:num_bytes]

    def offer(self, kv: Sequence[Tensor]) -> KVRef:
        layout = kv_memory.layout_of(kv)
        num_bytes = kv_memory.num_bytes(layout)
        piece = self._held.pop(kv[0].untyped_storage().data_ptr(), None) if kv else None
        if piece is None:  # an engine's own memory
            piece = self._take(num_bytes)
            for target, tensor in zip(kv_memory.views(piece.memory, layout), kv, strict=True):
                target.copy_(tensor)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # NIXL knows nothing of streams
        self._num_offers += 1
        ticket = b"%d" % self._num_offers
        self._offered[ticket] = piece
        return NixlRef(
            agent=self._name,
            metadata=piece.metadata,
            memory=self._memory,
            device_id=self._device_id,
            address=piece.address,
            num_bytes=num_bytes,
            layout=named_layout(layout),
            ticket=ticket,
        )

    def fetch(self, ref: KVRef) -> tuple[Tensor, ...] | None:
        assert isinstance(ref, NixlRef), "KV was offered through another carrier"
        try:
            piece = self._take(ref.num_bytes)
        except torch.OutOfMemoryError as error:
            warn_lost(str(error))
            return None
        try:
            is_done = self._read(ref, piece)
        except _NixlError as error:
            self._forget(ref.agent)
            self._free.append(piece)
            warn_lost(str(error))
            return None
        if not is_done:
            self._forget(ref.agent)  # the piece is not used again: a late answer may still write to it
            self._silent.add(ref.agent)
            warn_lost("no answer")
            return None
        self._silent.discard(ref.agent)
        self._held[piece.address] = piece
        return kv_memory.views(piece.memory, [(dtype_named(name), shape) for name, shape in ref.layout])

    def release(self, kv: Sequence[Tensor]) -> None:
        piece = self._held.pop(kv[0].untyped_storage().data_ptr(), None) if kv else None
        if piece is not None:
            self._free.append(piece)

    def recall(self) -> None:
        for taken in (self._held, self._offered):
            self._free += taken.values()
            taken.clear()

    def close(self) -> None:
        for piece in self._pieces:
            self._agent.deregisterMem(piece.registration)
        for taken in (self._pieces, self._free, self._held, self._offered, self._known):
            taken.clear()
        self._agent = None  # ends its threads and connections

    # Reading

    def _read(self, ref: NixlRef, piece: _Piece) -> bool:
        """Read what is offered into a piece; False when nothing came in time. Raises: _NixlError."""
        if (ref.agent, ref.metadata) not in self._known:
            self._agent.loadRemoteMD(ref.metadata)
            self._known.add((ref.agent, ref.metadata))
        num_bytes = max(1, ref.num_bytes)  # even nothing is read, for the notification
        ours = nixl.nixlXferDList(self._segment, [(piece.address, num_bytes, self._device_id)])
        segment = nixl.VRAM_SEG if ref.memory == "VRAM" else nixl.DRAM_SEG
        theirs = nixl.nixlXferDList(segment, [(ref.address, num_bytes, ref.device_id)])
        patience_s = _PATIENCE_AGAIN_S if ref.agent in self._silent else _PATIENCE_S
        give_up_s = time.monotonic() + patience_s + num_bytes / _LEAST_BYTES_PER_S
        request = self._agent.createXferReq(nixl.NIXL_READ, ours, theirs, ref.agent, ref.ticket)
        try:
            state = self._agent.postXferReq(request, ref.ticket)
            while state == nixl.NIXL_IN_PROG and time.monotonic() < give_up_s:
                time.sleep(_POLL_S)
                state = self._agent.getXferStatus(request)
        finally:
            with suppress(*_NixlError):  # it cannot be cancelled
                self._agent.releaseXferReq(request)
        return bool(state == nixl.NIXL_SUCCESS)

    def _forget(self, agent: str) -> None:
        self._known = {known for known in self._known if known[0] != agent}
        with suppress(*_NixlError):  # it has gone by itself
            self._agent.invalidateRemoteMD(agent)

    # Memory

    def _take(self, num_bytes: int) -> _Piece:
        """The smallest free piece that is large enough, or a new one."""
        self._reclaim()
        fitting = [piece for piece in self._free if len(piece.memory) >= num_bytes]
        if not fitting:
            return self._register(max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length()))
        piece = min(fitting, key=lambda piece: len(piece.memory))
        self._free.remove(piece)
        return piece

    def _reclaim(self) -> None:
        """Free what others say they have read."""
        for tickets in self._agent.getNotifs({}).values():
            for ticket in tickets:
                piece = self._offered.pop(ticket, None)
                if piece is not None:  # else it was recalled
                    self._free.append(piece)

    def _register(self, num_bytes: int) -> _Piece:
        with torch.inference_mode(False):  # or nothing could be written there outside of that mode
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        registration = nixl.nixlRegDList(self._segment, [(memory.data_ptr(), num_bytes, self._device_id, "")])
        self._agent.registerMem(registration)
        piece = _Piece(memory, registration, self._agent.getLocalPartialMD(registration, True))
        self._pieces.append(piece)
        return piece

    @property
    def _segment(self) -> Any:
        return nixl.VRAM_SEG if self._memory == "VRAM" else nixl.DRAM_SEG

    @property
    def _device_id(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.current_device() if self._device.index is None else self._device.index
