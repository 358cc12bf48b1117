"""What the driver holds of a generation worker: the worker's methods, each of which returns at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fuse.engines.engine import GenerationEngine, GenerationRequest
from fuse.engines.lockstep import Follower
from fuse.trace import Span
from fuse.workers.calls import Future, Worker
from fuse.workers.cluster import Cluster
from fuse.workers.engine_follower import EngineFollower, NextWeights
from fuse.workers.generation_worker import Departure, GenerationWorker, Progress
from fuse.workers.kv.transfer import MakeKVTransfer
from fuse.workers.weight_taker import WeightTakerHandle
from fuse.workers.weights import WeightsRef

_ROLE = "generation worker"


@dataclass(frozen=True, slots=True, eq=False)
class GenerationHandle:
    """A `GenerationWorker` in a process of its own, which has these methods under the same names."""

    worker: Worker[GenerationWorker]
    followers: tuple[Worker[EngineFollower], ...] = ()

    @classmethod
    def spawn(
        cls,
        cluster: Cluster,
        device: int,
        make_engine: Callable[[], GenerationEngine],
        make_kv_transfer: MakeKVTransfer,
        followers: tuple[Worker[EngineFollower], ...] = (),
    ) -> GenerationHandle:
        """Make a worker on a device; returns before it is made. followers: that share its engine."""
        return cls(cluster.spawn(_ROLE, device, GenerationWorker, make_engine, make_kv_transfer), followers)

    @staticmethod
    def spawn_follower(
        cluster: Cluster,
        device: int,
        key: bytes,
        follow: Callable[[Follower, NextWeights], None],
        weights: Sequence[WeightsRef],
    ) -> Worker[EngineFollower]:
        """Make a worker that shares another's engine, in the place of a device's own; returns before it is made."""
        return cluster.spawn(_ROLE, device, EngineFollower, cluster.host(device), key, follow, weights)

    @staticmethod
    def warm(cluster: Cluster, device: int, *imported: object) -> None:
        """Start the process of a device's next worker; it imports what defines `imported`."""
        cluster.warm(_ROLE, device, GenerationWorker, *imported)

    @property
    def processes(self) -> list[Worker[Any]]:
        """Of its engine, its own first."""
        return [self.worker, *self.followers]

    @property
    def takers(self) -> list[WeightTakerHandle]:
        """The same, as those that take the engine's weights."""
        return [WeightTakerHandle(process) for process in self.processes]

    def kv_capacity_tokens(self) -> Future[int | None]:
        """Tokens of which the engine holds keys and values at once; None where its samples set the limit."""
        return self.worker.call(GenerationWorker.kv_capacity_tokens)

    def submit(self, requests: Sequence[GenerationRequest]) -> Future[None]:
        """Queue samples; what the engine objects to is raised by a later call."""
        return self.worker.call(GenerationWorker.submit, requests)

    def admit(self, departures: Sequence[Departure]) -> Future[None]:
        """Continue samples that left another engine, as `submit` does."""
        return self.worker.call(GenerationWorker.admit, departures)

    def evict(self, sample_ids: Sequence[int], with_kv: bool = False) -> Future[list[Departure]]:
        """Take samples out, with all their tokens; those that have finished meanwhile are left out."""
        return self.worker.call(GenerationWorker.evict, sample_ids, with_kv)

    def poll(self, timeout_s: float, gather_s: float = 0.0) -> Future[list[Progress]]:
        """The tokens since the last poll, `gather_s` after a sample has finished, or after `timeout_s`.

        Runs beside other calls.
        """
        return self.worker.call(GenerationWorker.poll, timeout_s, gather_s)

    def sleep(self) -> Future[None]:
        """Free the memory of the engine, which must be empty, until it gets weights."""
        return self.worker.call(GenerationWorker.sleep)

    def drain_spans(self) -> Future[list[Span]]:
        """Spans since the last call."""
        return self.worker.call(GenerationWorker.drain_spans)

    def close(self) -> Future[None]:
        """Stop stepping and close the engine; live samples are dropped."""
        return self.worker.call(GenerationWorker.close)
