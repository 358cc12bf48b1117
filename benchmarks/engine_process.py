"""A generation engine in a process of its own, which vLLM needs and a fair comparison wants for both sides."""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import methodcaller
from types import TracebackType
from typing import Any

from torch import Tensor

from fuse.engines.engine import Evicted, GeneratedToken, GenerationEngine, GenerationRequest
from fuse.engines.kv_memory import Allocate

MakeEngine = Callable[[], GenerationEngine]


class EngineProcess:
    """A `GenerationEngine` whose calls run in another process, one at a time. A context manager: it ends on exit.

    core: the one core that it runs on; by default any.

    Functions, arguments and results are pickled; tensors travel as shared memory. What is raised there is raised here,
    with the other process's traceback as a note.
    """

    def __init__(self, make_engine: MakeEngine, *, core: int | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, core), daemon=True)
        with _environment():
            self._process.start()
        theirs.close()
        self.restart(make_engine)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._connection.close()  # which the process takes for its end
        self._process.join()

    @property
    def process_id(self) -> int | None:
        """None when it has ended."""
        return self._process.pid if self._process.is_alive() else None

    def run(self, function: Callable[[GenerationEngine], Any]) -> Any:
        """`function(engine)`, there."""
        return self._call(_run, function)

    def restart(self, make_engine: MakeEngine) -> None:
        """Close the engine, if there is one, and make another one in the same process."""
        self._call(_restart, make_engine)

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

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        self.run(methodcaller("load_weights", dict(state_dict)))

    def close(self) -> None:
        """Close the engine; the process lives on."""
        self.run(methodcaller("close"))

    def _call(self, command: Callable[[_Held, Any], Any], argument: Any) -> Any:
        try:
            self._connection.send((command, argument))
            result, error, trace = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"the engine's process has ended with exit code {self._process.exitcode}") from None
        if error is not None:
            error.add_note(trace)
            raise error
        return result


@dataclass(slots=True)
class _Held:
    """What the process has."""

    engine: GenerationEngine | None = None


def _serve(connection: Connection, core: int | None) -> None:
    """Obey until the other side is gone."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    held = _Held()
    while True:
        try:
            command, argument = connection.recv()
        except EOFError:
            break
        answer: tuple[Any, BaseException | None, str]
        try:
            answer = command(held, argument), None, ""
        except BaseException as error:  # noqa: BLE001  (the caller raises it)
            answer = None, error, traceback.format_exc()
        connection.send(answer)
    if held.engine is not None:
        held.engine.close()


def _run(held: _Held, function: Callable[[GenerationEngine], Any]) -> Any:
    assert held.engine is not None
    return function(held.engine)


def _restart(held: _Held, make_engine: MakeEngine) -> None:
    if held.engine is not None:
        held.engine.close()
        held.engine = None
    # vLLM collects garbage again and again as it starts and stops: spare it all that is here to stay.
    gc.collect()
    gc.freeze()
    held.engine = make_engine()


@contextmanager
def _environment() -> Iterator[None]:
    """A new process has one compute thread, as a generation worker has, and must know before it imports torch."""
    before = dict(os.environ)
    os.environ.update({"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
