"""A process that has imported what workers need, and from which a local cluster's worker processes are forked.

Imports take a worker's process seconds of computing, and a cluster has two processes per device: here they are imported
once, while Ray starts. Whoever is forked then runs Ray's own program, as if it had been started by it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_BACKLOG = 1024


class ForkServer(NamedTuple):
    """A server that runs. address: the path of its socket."""

    address: str
    process_id: int


@contextmanager
def fork_server(directory: Path, imported: Sequence[str]) -> Iterator[ForkServer]:
    """A server that has imported these modules, or is about to, with its socket in `directory`.

    None of them can import Ray, which learns from the environment which process it is in.
    What it writes itself goes to a file there. It has the environment of this moment, and ends with the block or with
    this process.
    """
    address = str(directory / "forking")
    with socket.socket(socket.AF_UNIX) as listener, (directory / "forking.log").open("wb") as log:
        listener.bind(address)
        listener.listen(_BACKLOG)
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno()), *imported],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # an interrupt in the terminal is the driver's
        )
    assert server.stdin is not None
    try:
        yield ForkServer(address, server.pid)
    finally:
        server.terminate()  # it may still be importing
        server.wait()
        server.stdin.close()


def _next_worker(listener: socket.socket) -> tuple[list[str], dict[str, str], str] | None:
    """In a forked process, what `fork_worker` asks it to become; in this one, None when nobody needs it any more."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        with connection:
            asked, standard, _, _ = socket.recv_fds(connection, 1, 3)
            if not asked:
                continue  # whoever asked has ended
            with connection.makefile("rb") as rest:
                request = json.loads(asked + rest.read())
            if os.fork() == 0:
                for target, descriptor in enumerate(standard):
                    os.dup2(descriptor, target)
                    os.close(descriptor)
                listener.close()
                return request["command"], request["environment"], request["directory"]
            connection.sendall(b"forked")
        for descriptor in standard:
            os.close(descriptor)


def _become_worker(command: list[str], environment: dict[str, str], directory: str) -> None:
    """Run Ray's program as the script that it is, with nothing left of what belongs to the server."""
    import numpy as np

    os.setpgrp()  # when it dies, Ray ends its group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    np.random.seed()  # as if each had been started for itself
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")


def main(descriptor: int, imported: Sequence[str]) -> None:
    """Import, then fork until standard input ends."""
    del sys.path[0]  # this directory
    gc.disable()
    sys.modules["ray"] = None  # type: ignore[assignment]  # to be found by none that could do without
    for module in imported:
        importlib.import_module(module)
    del sys.modules["ray"]
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that have ended are no zombies
    with socket.socket(fileno=descriptor) as listener:
        worker = _next_worker(listener)
    if worker is not None:
        _become_worker(*worker)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
