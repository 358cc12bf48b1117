"""The process of a device that shares the engine of another's generation worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fuse.engines.lockstep import Address, Follower
from fuse.workers.generation_worker import GenerationWorker
from fuse.workers.weights import WeightsRef, get_state_dict

NextStateDict = Callable[[], Mapping[str, Tensor]]


class EngineFollower:
    """Follows an engine in a thread of its own, from its start to its end.

    host: of this device. key: see `Group`. follow: does so, given what gives the weights that are loaded next, of which
    the first are `weights`.
    """

    concurrent_methods: ClassVar = GenerationWorker.concurrent_methods  # a process of the same kind, started for either

    def __init__(
        self,
        host: str,
        key: bytes,
        follow: Callable[[Follower, NextStateDict], None],
        weights: Sequence[WeightsRef],
    ) -> None:
        self._follower = Follower(host, key)
        self._weights: queue.SimpleQueue[Sequence[WeightsRef]] = queue.SimpleQueue()
        self._weights.put(weights)
        self._loop = threading.Thread(
            target=follow, args=(self._follower, self._next_state_dict), name="follow", daemon=True
        )
        self._loop.start()

    def address(self) -> Address:
        """Where it waits for the first process of its engine."""
        return self._follower.address

    def load_weights(self, weights: Sequence[WeightsRef]) -> None:
        """The weights that the first process loads next."""
        self._weights.put(weights)

    def close(self) -> None:
        """Wait for the end of the engine, which its first process closes."""
        if self._follower.is_led:
            self._loop.join()

    def _next_state_dict(self) -> Mapping[str, Tensor]:
        return get_state_dict(self._weights.get())
