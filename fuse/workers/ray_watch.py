"""Ends a run when a process of its own Ray cluster has ended, of which Ray itself would tell in a minute and a page."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from fuse.termination import raise_in_main_thread
from fuse.workers.errors import ClusterError
from fuse.workers.reaper import ended

_GRACE_S = 10.0
"""For the run to close; what it asks of Ray then may wait for a minute."""


@contextmanager
def watched(processes: Mapping[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """While the body runs, the end of one of these processes, by name, raises ClusterError in the main thread.

    Where Ray ends this process first, or has it wait for what has ended, the reaper says the same and cleans up.
    """
    left = threading.Event()

    def watch(name: str, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        if not left.is_set():
            raise_in_main_thread(ClusterError(ended(name)))
            if not left.wait(_GRACE_S):
                os._exit(1)

    for name, process in processes.items():
        threading.Thread(target=watch, args=(name, process), name=f"watch {name}", daemon=True).start()
    try:
        yield
    finally:
        left.set()
