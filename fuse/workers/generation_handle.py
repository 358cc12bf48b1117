"""What the driver holds of a generation worker: the worker's methods, each of which returns at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fuse.engines.engine import GenerationEngine, GenerationRequest
from fuse.trace import Span
from fuse.workers.calls import Future, Worker
from fuse.workers.carriers.parcel import Parcel
from fuse.workers.cluster import Cluster
from fuse.workers.generation_worker import Departure, GenerationWorker, Progress
from fuse.workers.kv.transfer import MakeKVTransfer
from fuse.workers.weight_port import Membership

_ROLE = "generation worker"


@dataclass(frozen=True, slots=True, eq=False)
class GenerationHandle:
    """A `GenerationWorker` in a process of its own, which has these methods under the same names."""

    worker: Worker[GenerationWorker]

    @classmethod
    def spawn(
        cls,
        cluster: Cluster,
        device: int,
        make_engine: Callable[[], GenerationEngine],
        make_kv_transfer: MakeKVTransfer,
    ) -> GenerationHandle:
        """Make a worker on a device; returns before it is made."""
        return cls(cluster.spawn(_ROLE, device, GenerationWorker, make_engine, make_kv_transfer))

    @staticmethod
    def warm(cluster: Cluster, device: int, *imported: object) -> None:
        """Start the process of a device's next worker; it imports what defines `imported`."""
        cluster.warm(_ROLE, device, GenerationWorker, *imported)

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

    def poll(self, timeout_s: float) -> Future[list[Progress]]:
        """The tokens since the last poll, once a sample has finished or after `timeout_s`; runs beside other calls."""
        return self.worker.call(GenerationWorker.poll, timeout_s)

    def sleep(self) -> Future[None]:
        """Free the memory of the engine, which must be empty, until it gets weights."""
        return self.worker.call(GenerationWorker.sleep)

    def begin_weights(self, shapes: Mapping[str, torch.Size]) -> Future[None]:
        """Have the engine, which must be empty, wait for new weights; what it objects to is raised by a later call."""
        return self.worker.call(GenerationWorker.begin_weights, shapes)

    def load(self, parcel: Parcel) -> Future[None]:
        """Give the engine some of its weights; ends when it needs the parcel no more."""
        return self.worker.call(GenerationWorker.load, parcel)

    def end_weights(self) -> Future[None]:
        """The engine has got all of its weights, and works by them when this ends."""
        return self.worker.call(GenerationWorker.end_weights)

    def join(self, own: Membership) -> Future[None]:
        """Become a member of a group to which weights are broadcast; all members do at once."""
        return self.worker.call(GenerationWorker.join, own)

    def leave(self, group: str) -> Future[None]:
        """Leave such a group."""
        return self.worker.call(GenerationWorker.leave, group)

    def drain_spans(self) -> Future[list[Span]]:
        """Spans since the last call."""
        return self.worker.call(GenerationWorker.drain_spans)

    def close(self) -> Future[None]:
        """Stop stepping and close the engine; live samples are dropped."""
        return self.worker.call(GenerationWorker.close)
