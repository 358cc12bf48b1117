"""A generation engine in a process of its own, which vLLM needs and a fair comparison wants for both sides."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter, methodcaller
from typing import Any

from torch import Tensor

from fuse.benchmarks.peer_process import PeerProcess, reply
from fuse.engines.engine import Evicted, GeneratedToken, GenerationEngine, GenerationRequest
from fuse.engines.kv_memory import Allocate

MakeEngine = Callable[[], GenerationEngine]
# A process has one compute thread, as a generation worker has, and must know before it imports torch.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class EngineProcess(PeerProcess):
    """A `GenerationEngine` whose calls run in another process, one at a time.

    core: the one core that it runs on; by default any.
    """

    def __init__(self, make_engine: MakeEngine, *, core: int | None = None) -> None:
        super().__init__("the engine's process", _serve, core, environment=_ENVIRONMENT)
        self.restart(make_engine)

    def __enter__(self) -> EngineProcess:
        return self

    def run(self, function: Callable[[GenerationEngine], Any]) -> Any:
        """`function(engine)`, there."""
        return self.ask(partial(_run, function=function))

    def restart(self, make_engine: MakeEngine) -> None:
        """Close the engine, if there is one, and make another one in the same process."""
        self.ask(partial(_restart, make_engine=make_engine))

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


@dataclass(slots=True)
class _Held:
    """What the process has."""

    engine: GenerationEngine | None = None

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None


def _serve(connection: Connection, core: int | None) -> None:
    """Obey until the other side is gone."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    held = _Held()
    try:
        while True:
            reply(connection, partial(connection.recv(), held))
    finally:
        held.close()


def _run(held: _Held, function: Callable[[GenerationEngine], Any]) -> Any:
    assert held.engine is not None
    return function(held.engine)


def _restart(held: _Held, make_engine: MakeEngine) -> None:
    held.close()
    held.engine = make_engine()
