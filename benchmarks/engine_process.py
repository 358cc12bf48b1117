"""A generation engine in a process of its own, which vLLM needs and a fair comparison wants for both sides."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from fuse.benchmarks.peer_process import PeerProcess
from fuse.engines.engine import GenerationEngine

MakeEngine = Callable[[], GenerationEngine]
# A process has one compute thread, as a generation worker has, and must know before it imports torch.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class EngineProcess(PeerProcess):
    """Calls functions of an engine in another process, one at a time.

    core: the one core that it runs on; by default any.
    """

    def __init__(self, make_engine: MakeEngine, *, core: int | None = None) -> None:
        super().__init__("the engine's process", _serve, core, environment=_ENVIRONMENT)
        self.restart(make_engine)

    def run(self, function: Callable[[GenerationEngine], Any]) -> Any:
        """`function(engine)`, there; an engine that refuses something lives on."""
        return self.ask(partial(_run, function=function))

    def restart(self, make_engine: MakeEngine) -> None:
        """Close the engine, if there is one, and make another one in the same process."""
        self.ask(partial(_restart, make_engine=make_engine))


_Held = list[GenerationEngine]
"""What the process has: one engine, or none."""


def _serve(connection: Connection, core: int | None) -> None:
    """Obey until the other side is gone."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    held: _Held = []
    try:
        while True:
            question = connection.recv()
            try:
                answer = question(held)
            except BaseException as error:  # noqa: BLE001  (raised on the other side)
                error.add_note(traceback.format_exc())
                answer = error
            connection.send(answer)
    finally:
        _close(held)


def _run(held: _Held, function: Callable[[GenerationEngine], Any]) -> Any:
    (engine,) = held
    return function(engine)


def _restart(held: _Held, make_engine: MakeEngine) -> None:
    _close(held)
    held.append(make_engine())


def _close(held: _Held) -> None:
    while held:
        held.pop().close()
