"""Runs checks, each in a process group of its own that is ended when it takes too long; none ends another."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fuse.benchmarks.gpu.setup import Row, Setup
from fuse.benchmarks.measure import describe_machine
from fuse.ops.native import extension

_ENDING_S = 10.0
"""What a process may take to end by itself once it has told everything."""


def run(name: str, check: Callable[[Setup], Iterator[Any]], setup: Setup, limit_s: float) -> Iterator[Any]:
    """What a check tells, its rows, as it does, and a row if it fails or takes longer."""
    context: Any = setup.context
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(sender, name, check, setup))
    deadline_s = time.monotonic() + limit_s
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(max(0.0, deadline_s - time.monotonic())):
                yield Row(name=name, ok=False, detail=f"took longer than {limit_s:.0f} s and was ended")
                return
            row = receiver.recv()
            if row is None:
                wait([process.sentinel], _ENDING_S)
                return
            yield row
    except EOFError:
        wait([process.sentinel], _ENDING_S)
        yield Row(name=name, ok=False, detail="its process ended before it was done")
    finally:
        receiver.close()
        _end(process)


def describe(setup: Setup) -> Iterator[dict[str, object]]:
    """What figures depend on. A check like others, for nothing may start CUDA where they are run from."""
    told = describe_machine() | {"native": extension()[1]}
    if setup.device == "cuda":
        if not torch.cuda.is_available():
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPUs"
            raise ValueError(f"torch {torch.__version__} {built} and finds no GPU: mend that, or use --device cpu")
        told |= {"cuda": torch.version.cuda, "nccl": list(torch.cuda.nccl.version())}
        told["gpu_free_bytes"], told["gpu_bytes"] = torch.cuda.mem_get_info()
    yield told


def _tell(sender: Connection, name: str, check: Callable[[Setup], Iterator[Any]], setup: Setup) -> None:
    os.setsid()  # whatever it starts is ended with it
    torch.set_num_threads(1)
    try:
        for row in check(setup):
            sender.send(row)
    except BaseException as error:  # noqa: BLE001  (a row as any other)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())
        traceback.print_exc()
        sender.send(Row(name=name, ok=False, detail=f"{text[:400]} ({where.filename}:{where.lineno})"))
    sender.send(None)


def _end(process: Any) -> None:
    """End what is left of the process's group; until the process is waited for, its number is no other's."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not become a group yet
        process.kill()
    process.join()
