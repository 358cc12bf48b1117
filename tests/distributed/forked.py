"""Worlds of forked processes, which import torch once for all."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from fuse.intrastage.communication import connect, disconnect, serve_store

CONTEXT = multiprocessing.get_context("fork")
TIMEOUT_S = 300.0
_PATIENCE_S = 600.0

Measure = Callable[[int], Mapping[str, object]]


@dataclass(frozen=True)
class World:
    """The processes of a world. num_survivors: the first ranks, whose ends alone are waited for."""

    name: str
    ranks: list[ForkProcess]
    num_survivors: int | None

    @classmethod
    def start(
        cls, name: str, num_ranks: int, measure: Measure, directory: Path, *, num_survivors: int | None = None
    ) -> World:
        """Have every rank measure, and write what it found to DIRECTORY/{name}-{rank}.json.

        num_survivors: where the ends of the other ranks may not come; nobody takes leave then.
        """
        ports: SimpleQueue[int] = CONTEXT.SimpleQueue()  # the store itself is rank 0's: forking must find no threads
        ranks = [
            CONTEXT.Process(
                target=_run_rank, args=(name, rank, num_ranks, ports, measure, directory, num_survivors is None)
            )
            for rank in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        return cls(name, ranks, num_survivors)

    def end(self) -> None:
        """Wait for those that measure, and leave none behind.

        Raises: RuntimeError where one of them failed, which has printed why, or was killed.
        """
        survivors = self.ranks[: self.num_survivors]
        for process in survivors:
            process.join(_PATIENCE_S)
        codes = [process.exitcode for process in survivors]
        for process in self.ranks:
            process.kill()
            process.join()
        if any(code != 0 for code in codes):
            raise RuntimeError(f"ranks of {self.name} ended with {codes}")


def run_world(name: str, num_ranks: int, measure: Measure, directory: Path) -> None:
    """A world from its start to its end."""
    World.start(name, num_ranks, measure, directory).end()


def run_alone(function: Callable[[], None]) -> None:
    """Run in a process of its own: whoever has computed gradients had better not be forked."""
    process = CONTEXT.Process(target=function)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function} ended with {process.exitcode}")


def _run_rank(
    name: str,
    rank: int,
    num_ranks: int,
    ports: SimpleQueue[int],
    measure: Measure,
    directory: Path,
    takes_leave: bool,
) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        store = serve_store("127.0.0.1", TIMEOUT_S)
        for _ in range(num_ranks):
            ports.put(store.port)
    connect(rank, num_ranks, "127.0.0.1", ports.get(), torch.device("cpu"), TIMEOUT_S)
    start_s = time.monotonic()
    found = measure(rank)
    print(f"{name} rank {rank}: {time.monotonic() - start_s:.1f} s", flush=True)
    (directory / f"{name}-{rank}.json").write_text(json.dumps(found))
    if takes_leave:
        disconnect()
