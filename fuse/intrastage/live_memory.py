"""How much memory tensors hold, on any device, whoever holds them: counted at their creation, until they are freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class LiveMemory(TorchDispatchMode):
    """While entered, `bytes` is the size of all storages made since and still alive, those autograd holds included.

    `peak_bytes` is the most that was, which may be set back to `bytes`.

    Storages made before are not counted, nor those of functions that hide them from torch (compiled kernels' scratch).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak_bytes = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:  # often asked by tensors that only have shapes, and takes nothing
            return func(*args)
        for tensor in _tensors((*args, *(kwargs or {}).values())):  # it is older, or known
            self._known.setdefault(tensor.untyped_storage(), True)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self._change(size)
        weakref.finalize(storage, self._change, -size)

    def _change(self, num_bytes: int) -> None:
        self.bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Of an operator's arguments or results, in lists or not."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
