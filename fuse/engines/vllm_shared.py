"""A vLLM engine over several devices: a process per device, each with a part of every matrix and of every head's cache.

Every process has vLLM's scheduler and steps it itself, told by the first one; the same requests in the same order make
the same batches. Needs vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fuse.engines.engine import Evicted, GeneratedToken
from fuse.engines.kv_memory import Allocate
from fuse.engines.lockstep import Leader
from fuse.engines.vllm_core import VllmCore


class LeadingCore:
    """The first process's `VllmCore`, and those of the others with it. KV does not leave it."""

    def __init__(self, core: VllmCore, leader: Leader) -> None:
        self._core, self._leader = core, leader
        self.kv_capacity_tokens = core.kv_capacity_tokens

    def add(self, evicted: Evicted) -> str:
        internal_id = self._core.add(evicted)  # which may refuse it
        with self._leader.together():
            self._leader.tell("add", internal_id, evicted)
        return internal_id

    def read_kv(self, internal_id: str, allocate: Allocate | None) -> None:
        return None

    def abort(self, internal_id: str) -> None:
        with self._leader.together():
            self._leader.tell("abort", internal_id)
            self._core.abort(internal_id)

    def step(self) -> list[GeneratedToken]:
        with self._leader.together():
            self._leader.tell("step")
            return self._core.step()

    @property
    def is_asleep(self) -> bool:
        return self._core.is_asleep

    def sleep(self) -> None:
        with self._leader.together():
            self._leader.tell("sleep")
            self._core.sleep()
            self._leader.wait()  # the memory is other processes' now

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The others get the same weights on their own way."""
        with self._leader.together():
            self._leader.tell("load_weights")
            self._core.load_weights(tensors)
            self._leader.wait()

    def close(self) -> None:
        self._leader.close()
        self._core.close()


class FollowingCore:
    """Another process's: does what its leader tells.

    next_weights: gives the weights that the leader loads, under all names, the first ones when this is made.
    """

    def __init__(self, core: VllmCore, next_weights: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        self._core, self._next_weights = core, next_weights
        self._own_ids: dict[str, tuple[str, int]] = {}  # internal id and sample, by the leader's internal id

    def add(self, internal_id: str, evicted: Evicted) -> None:
        self._own_ids[internal_id] = self._core.add(evicted), evicted.request.sample_id

    def abort(self, internal_id: str) -> None:
        own, _ = self._own_ids.pop(internal_id)
        self._core.abort(own)

    def step(self) -> None:
        finished = {token.sample_id for token in self._core.step() if token.finished}
        if finished:
            self._own_ids = {key: one for key, one in self._own_ids.items() if one[1] not in finished}

    def sleep(self) -> None:
        self._core.sleep()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the device's other process

    def load_weights(self) -> None:
        self._core.load_weights(self._next_weights())

    def close(self) -> None:
        self._core.close()
