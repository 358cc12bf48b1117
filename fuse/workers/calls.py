"""How workers are called, and how one waits: a call returns at once, with a `Future` of what the method returns."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeAlias, TypeVar, cast

import ray
from ray.exceptions import RayActorError, RayError

from fuse.workers.errors import WorkerError, cause_of, dead_process_id

_W = TypeVar("_W")  # a worker's class
_P = ParamSpec("_P")
_T = TypeVar("_T")

Remote: TypeAlias = _T | ray.ObjectRef[_T]
"""An argument of a call: a value, or a reference to it in the object store, of which the worker gets the value."""

_NUM_LAST_LINES = 40


def as_received(argument: Remote[_T]) -> _T:
    """The argument itself, with the type that it has where it arrives: Ray resolves references on the way."""
    return cast(_T, argument)


class Worker(Generic[_W]):
    """An object of a class `_W` that lives in a process on a device.

    Calls run one at a time in order. Methods that the class names in `concurrent_methods` may block: they run, one at
    a time, beside the others.
    """

    def __init__(
        self,
        role: str,
        device: int,
        actor: Any,
        started: ray.ObjectRef[int],
        concurrent: frozenset[str],
        logs: Path | None,
    ) -> None:
        self.role = role
        self.device = device
        self._actor = actor
        self._started = started
        self._concurrent = concurrent
        self._logs = logs

    def call(self, method: Callable[Concatenate[_W, _P], _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Call a method of the object, named by its class's own: `worker.call(GenerationWorker.poll, 1.0)`.

        Arguments and result are pickled; references among the arguments arrive as what they refer to.
        """
        name = method.__name__
        entry = self._actor.call_beside if name in self._concurrent else self._actor.call
        return Future(self, entry.remote(name, *args, **kwargs))

    def wait_started(self) -> None:
        """Wait until the worker is made. Raises: WorkerError when it could not be."""
        self._get(self._started)

    @property
    def process_id(self) -> int:
        """The worker's process id on its host; waits until the worker is made."""
        return self._get(self._started)

    def sees(self, path: str) -> Future[bool]:
        """Whether the worker's process finds a file of this path."""
        return Future(self, self._actor.sees.remote(path))

    def kill(self) -> None:
        """End the process at once; its pending calls fail. A second time does nothing."""
        ray.kill(self._actor)

    def _get(self, reference: ray.ObjectRef[_T]) -> _T:
        try:
            return ray.get(reference)
        except RayError as error:
            raise self._failure(error) from error

    def _failure(self, error: RayError) -> WorkerError:
        """Say why a call failed; when the worker could not be made, that is the reason for all that follows."""
        reason = error
        try:
            ray.get(self._started)
        except RayError as first:
            reason = first
        if self._logs is not None:
            for line in _last_lines(self._logs, dead_process_id(reason)):
                error.add_note(line)
        return WorkerError(self.device, self.role, cause_of(reason), is_death=isinstance(reason, RayActorError))


class Future(Generic[_T]):
    """The result of a call that may not have ended.

    Ray tells of its end, so that whoever waits for some call out of many asks about none of them.
    """

    __slots__ = ("_listener", "_reference", "_value", "_worker")

    def __init__(self, worker: Worker[Any], reference: ray.ObjectRef[_T]) -> None:
        self._worker = worker
        self._reference = reference
        self._value: Any = _UNKNOWN
        self._listener: deque[Future[Any]] | None = None
        reference._on_completed(self._end)

    def _end(self, value: Any) -> None:
        """Called by a thread of Ray's, with what was returned or raised."""
        with _ended:
            self._value = value
            if self._listener is not None:
                self._listener.append(self)
            _ended.notify_all()

    def tell(self, listener: deque[Future[Any]]) -> None:
        """Be appended there at the end of the call; at once if it has ended."""
        with _ended:
            self._listener = listener
            if self.has_ended:
                listener.append(self)

    @property
    def has_ended(self) -> bool:
        """By whatever end."""
        return self._value is not _UNKNOWN

    def result(self) -> _T:
        """Wait for the call to end. Raises: WorkerError when it raised or its process died."""
        if self.has_ended and not isinstance(self._value, RayError):
            return cast(_T, self._value)
        return self._worker._get(self._reference)


_UNKNOWN = object()
_ended = threading.Condition()
"""Whenever a call has ended."""
_INTERRUPTION_S = 0.5
"""After which a thread that waits looks whether it is to raise something: of the end of Ray, no call tells."""


def wait_ended(futures: Sequence[Future[Any]], timeout_s: float | None = None) -> list[Future[Any]]:
    """Wait until at least one of the calls has ended, by whatever end; returns all that have, in order of the calls.

    After `timeout_s` that may be none.
    """
    latest_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
    with _ended:
        while not any(future.has_ended for future in futures) and (left_s := latest_s - time.monotonic()) > 0:
            _ended.wait(min(left_s, _INTERRUPTION_S))
        return [future for future in futures if future.has_ended]


class PendingCalls:
    """Calls that nobody has heard the end of, and what is done then.

    An answer costs as much as it would if no other call was pending: none is asked whether it has ended.
    """

    def __init__(self) -> None:
        self._then: dict[Future[Any], Callable[[], None]] = {}
        self._ended: deque[Future[Any]] = deque()

    def __len__(self) -> int:
        return len(self._then)

    def expect(self, future: Future[Any], then: Callable[[], None]) -> None:
        """Have `then` called by whoever hears the end of this call."""
        self._then[future] = then
        future.tell(self._ended)

    def heard(self, timeout_s: float | None = None) -> list[Callable[[], None]]:
        """Wait until at least one of them has ended; gives what is done then, for all that have, in that order.

        After `timeout_s` that may be none.
        """
        latest_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with _ended:
            while not self._ended and (left_s := latest_s - time.monotonic()) > 0:
                _ended.wait(min(left_s, _INTERRUPTION_S))
            ended = list(self._ended)
            self._ended.clear()
        return [self._then.pop(future) for future in ended]


def gather(futures: Sequence[Future[_T]], timeout_s: float | None = None) -> list[_T]:
    """Wait for all calls and return their results in order.

    Raises:
        WorkerError: at the first call that raised or whose process died, without waiting for the others, which may
            be stuck waiting for it; or where none ended within `timeout_s` of the one before.
    """
    pending = dict(enumerate(futures))
    results: dict[int, _T] = {}
    while pending:
        if not wait_ended(list(pending.values()), timeout_s):
            worker = next(iter(pending.values()))._worker
            raise WorkerError(worker.device, worker.role, f"no answer within {timeout_s:g} s")
        for index in [index for index, future in pending.items() if future.has_ended]:
            results[index] = pending.pop(index).result()
    return [results[index] for index in range(len(futures))]


def _last_lines(logs: Path, process_id: int | None) -> list[str]:
    """The end of what a process wrote to stderr, which is where a crash of native code reports itself."""
    lines = [line for log in logs.glob(f"*/session_latest/logs/worker-*-{process_id}.err") for line in _lines(log)]
    return [line for line in lines if not line.startswith(":")][-_NUM_LAST_LINES:]  # ":" marks Ray's own lines


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()
