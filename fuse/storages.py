"""Memory of tensors that nobody reads for a while: given back, and taken again under the same tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Released:
    """bits: uint8 [bytes] in host memory; None where they are not needed again."""

    storage: torch.UntypedStorage
    num_bytes: int
    bits: Tensor | None


class Storages:
    """Releases and restores the memory of tensors in place: views of them, ties, and whoever holds them stay.

    Nobody may read or write the tensors in between.
    """

    def __init__(self) -> None:
        self._released: list[_Released] = []

    @property
    def are_released(self) -> bool:
        return bool(self._released)

    def release(self, tensors: Iterable[Tensor], *, keep_bits: bool) -> None:
        """Free their memory. keep_bits: `restore` brings back what they hold; it waits in (pinned) host memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            num_bytes = storage.nbytes()
            if not num_bytes:
                continue  # empty, or the storage of another of them
            bits = None
            if keep_bits:
                whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                bits = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
                bits.copy_(whole)
            storage.resize_(0)
            self._released.append(_Released(storage, num_bytes, bits))

    def restore(self) -> None:
        """Take the memory again. What was released without its bits is undefined, and finite: zero."""
        released, self._released = self._released, []
        for one in released:
            one.storage.resize_(one.num_bytes)
            whole = torch.empty(0, dtype=torch.uint8, device=one.storage.device).set_(one.storage)
            if one.bits is None:
                whole.zero_()
            else:
                whole.copy_(one.bits)
