"""The process of a device that shares the engine of another's generation worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fuse.engines.lockstep import Address, Follower
from fuse.workers.generation_worker import GenerationWorker
from fuse.workers.weight_inbox import WeightInbox
from fuse.workers.weight_taker import WeightTaker
from fuse.workers.weights import WeightsRef, get_state_dict

_Weights = Iterable[tuple[str, Tensor]]
NextWeights = Callable[[], _Weights]


class EngineFollower(WeightTaker):
    """Follows an engine in a thread of its own, from its start to its end.

    host: of this device. key: see `Group`. follow: does so, given what gives the weights that are loaded next, of which
    the first are `weights`.
    """

    concurrent_methods: ClassVar = GenerationWorker.concurrent_methods  # a process of the same kind, started for either

    def __init__(
        self,
        host: str,
        key: bytes,
        follow: Callable[[Follower, NextWeights], None],
        weights: Sequence[WeightsRef],
    ) -> None:
        super().__init__()
        self._follower = Follower(host, key)
        self._coming: queue.SimpleQueue[NextWeights] = queue.SimpleQueue()
        self._coming.put(lambda: get_state_dict(weights).items())
        self._loop = threading.Thread(
            target=follow, args=(self._follower, self._next_weights), name="follow", daemon=True
        )
        self._loop.start()

    def address(self) -> Address:
        """Where it waits for the first process of its engine."""
        return self._follower.address

    def close(self) -> None:
        """Wait for the end of the engine, which its first process closes."""
        if self._follower.is_led:
            self._loop.join()

    def _take(self, shapes: Mapping[str, torch.Size], inbox: WeightInbox) -> None:
        """When the first process loads them, which has looked at the shapes."""
        self._coming.put(lambda: inbox)

    def _next_weights(self) -> _Weights:
        return self._coming.get()()
