"""A worker's process from the inside: pinned to a core, it makes the worker and passes calls on to it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray


class Process:
    """A worker's process: makes the worker and passes calls on to it."""

    def __init__(self) -> None:
        gc.disable()  # imports leave none, and a fifth of their time would go into looking for it

    def warm(self, *imported: object) -> None:
        """Does nothing but that arguments are unpickled, and so the modules imported that define them."""

    def start(
        self, core: int | None, worker_class: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int:
        """Pin the process, make the worker, return the process id. `core` counts the cores available, and wraps."""
        _collect_garbage()
        if core is not None:
            available = sorted(os.sched_getaffinity(0))
            _pin(available[core % len(available)])
        self._worker = worker_class(*args, **kwargs)
        return os.getpid()

    def sees(self, path: str) -> bool:
        """Whether there is such a file from here."""
        return os.path.isfile(path)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the worker's method of this name."""
        return getattr(self._worker, method)(*args, **kwargs)


class ConcurrentProcess(Process):
    """A worker's process in which one more call may run beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self._ended_start = threading.Event()

    def start(
        self, core: int | None, worker_class: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> int:
        """As `Process.start`; calls beside it wait for its end."""
        try:
            return super().start(core, worker_class, args, kwargs)
        finally:
            self._ended_start.set()

    @ray.method(concurrency_group="beside")
    def call_beside(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """As `call`, beside the others."""
        self._ended_start.wait()
        return getattr(self._worker, method)(*args, **kwargs)


def concurrent_methods(worker_class: Callable[..., object]) -> frozenset[str]:
    """The names of a worker's methods that may block, and so run beside the others."""
    return frozenset(getattr(worker_class, "concurrent_methods", ()))


def actor_class(worker_class: Callable[..., object]) -> Any:
    """The Ray actor in which a worker of this class can live."""
    # Any: Ray's types know neither concurrency groups nor options of a class chosen at run time.
    remote: Any = ray.remote
    if concurrent_methods(worker_class):
        return remote(concurrency_groups={"beside": 1})(ConcurrentProcess)
    return remote(Process)


def _collect_garbage() -> None:
    """From now on, but not among what was imported."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _pin(core: int) -> None:
    """Keep this process to a core: all its threads, and those that they start meanwhile."""
    pinned: set[str] = set()
    while unpinned := {*os.listdir("/proc/self/task")} - pinned:
        for thread in unpinned:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), {core})
        pinned |= unpinned
