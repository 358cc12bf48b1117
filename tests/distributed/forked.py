"""Worlds of forked processes, one after the other, which import torch once for all."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch

from fuse.intrastage.communication import connect, disconnect, serve_store

CONTEXT = multiprocessing.get_context("fork")
TIMEOUT_S = 30.0
_PATIENCE_S = 120.0

Measure = Callable[[int], Mapping[str, object]]


def run_world(
    name: str, num_ranks: int, measure: Measure, directory: Path, *, num_survivors: int | None = None
) -> None:
    """Have every rank of a world measure, and write what it found to DIRECTORY/{name}-{rank}.json.

    num_survivors: the first ranks, whose ends are waited for where those of others may not come; nobody takes leave.
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
    for process in ranks[:num_survivors]:
        process.join(_PATIENCE_S)
    for process in ranks:
        process.kill()
        process.join()


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
