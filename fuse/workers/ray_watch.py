"""Ends a run when a process of its own Ray cluster has ended, of which Ray itself would tell in a minute and a page."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fuse.termination import raise_in_main_thread
from fuse.workers.errors import ClusterError


@contextmanager
def watched(processes: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """While the body runs, the end of one of these processes, by name, raises ClusterError in the main thread."""
    left = threading.Event()

    def watch(name: str, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not left.is_set():
            raise_in_main_thread(
                ClusterError(
                    f"Ray's {name} has ended (exit code {status}), and with it the run: see that the machine has "
                    "memory left, and resume from the last checkpoint"
                )
            )

    for name, process in processes.items():
        threading.Thread(target=watch, args=(name, process), name=f"watch {name}", daemon=True).start()
    try:
        yield
    finally:
        left.set()
