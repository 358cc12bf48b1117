"""How workers are called, and how one waits: a call returns at once, with a `Future` of what the method returns."""

from __future__ import annotations

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
    """The result of a call that may not have ended."""

    __slots__ = ("_reference", "_worker")

    def __init__(self, worker: Worker[Any], reference: ray.ObjectRef[_T]) -> None:
        self._worker = worker
        self._reference = reference

    def result(self) -> _T:
        """Wait for the call to end. Raises: WorkerError when it raised or its process died."""
        return self._worker._get(self._reference)


def wait_ended(futures: Sequence[Future[Any]], timeout_s: float | None = None) -> list[Future[Any]]:
    """Wait until at least one of the calls has ended, by whatever end; returns all that have, in order of the calls.

    After `timeout_s` that may be none.
    """
    by_reference = {future._reference: future for future in futures}
    ray.wait(list(by_reference), num_returns=1, timeout=timeout_s)
    ended, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)
    done = set(ended)
    return [future for reference, future in by_reference.items() if reference in done]


def gather(futures: Sequence[Future[_T]], timeout_s: float | None = None) -> list[_T]:
    """Wait for all calls and return their results in order.

    Raises:
        WorkerError: at the first call that raised or whose process died, without waiting for the others, which may
            be stuck waiting for it; or where none ended within `timeout_s` of the one before.
    """
    pending = {future._reference: index for index, future in enumerate(futures)}
    results: dict[int, _T] = {}
    while pending:
        ray.wait(list(pending), num_returns=1, timeout=timeout_s)
        ended, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
        if not ended:
            worker = futures[next(iter(pending.values()))]._worker
            raise WorkerError(worker.device, worker.role, f"no answer within {timeout_s:g} s")
        for reference in ended:
            index = pending.pop(reference)
            results[index] = futures[index].result()
    return [results[index] for index in range(len(futures))]


def _last_lines(logs: Path, process_id: int | None) -> list[str]:
    """The end of what a process wrote to stderr, which is where a crash of native code reports itself."""
    lines = [line for log in logs.glob(f"*/session_latest/logs/worker-*-{process_id}.err") for line in _lines(log)]
    return [line for line in lines if not line.startswith(":")][-_NUM_LAST_LINES:]  # ":" marks Ray's own lines


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()
