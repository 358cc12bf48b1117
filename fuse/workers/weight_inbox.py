"""Weights from the thread that is given them to the one whose engine takes them in, a bucket at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

_Part: TypeAlias = "Iterable[tuple[str, Tensor]]"


class WeightInbox:
    """An iterable that another thread fills while it is read, once.

    `put` and `end` return when the reader has done with what they gave: it has asked for more.
    """

    def __init__(self) -> None:
        self._parts: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._given: Future[None] | None = None
        self._failure: BaseException | None = None

    def put(self, tensors: _Part) -> None:
        """Raises: what the reader ended by, if it has."""
        self._give(tensors)

    def end(self) -> None:
        """There are no more."""
        self._give(None)

    def fail(self, failure: BaseException) -> None:
        """End both sides: the reader, if it waits, and who gives it anything, now or later."""
        with self._lock:
            self._failure = failure
            if self._given is not None and not self._given.done():
                self._given.set_exception(failure)
        self._parts.put(None)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            tensors = self._parts.get()
            if self._failure is not None:
                raise self._failure
            if tensors is not None:
                yield from tensors
            assert self._given is not None
            self._given.set_result(None)
            if tensors is None:
                return

    def _give(self, tensors: _Part | None) -> None:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            given = self._given = Future[None]()
        self._parts.put(tensors)
        given.result()
