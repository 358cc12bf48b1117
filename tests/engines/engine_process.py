"""A generation engine in another process, as if it were here."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter, methodcaller

from torch import Tensor

from fuse.benchmarks.engine_process import EngineProcess
from fuse.engines.engine import Evicted, GeneratedToken, GenerationRequest
from fuse.engines.kv_memory import Allocate


class DistantEngine(EngineProcess):
    """A `GenerationEngine` whose calls run there."""

    @property
    def kv_capacity_tokens(self) -> int | None:
        capacity: int | None = self.run(attrgetter("kv_capacity_tokens"))
        return capacity

    def submit(self, request: GenerationRequest) -> None:
        self.run(methodcaller("submit", request))

    def step(self) -> list[GeneratedToken]:
        generated: list[GeneratedToken] = self.run(methodcaller("step"))
        return generated

    def evict(self, sample_id: int, *, with_kv: bool = False, allocate: Allocate | None = None) -> Evicted:
        assert allocate is None, "memory of this process is not there"
        evicted: Evicted = self.run(methodcaller("evict", sample_id, with_kv=with_kv))
        return evicted

    def admit(self, evicted: Evicted) -> None:
        self.run(methodcaller("admit", evicted))

    def sleep(self) -> None:
        self.run(methodcaller("sleep"))

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        self.run(methodcaller("load_weights", dict(state_dict)))

    def close(self) -> None:
        """Close the engine; the process lives on."""
        self.run(methodcaller("close"))
