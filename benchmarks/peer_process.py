"""A process of its own that answers what it is asked, one question at a time."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn

_CLOSING_S = 60.0
"""What closing, as of an engine, may take."""


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException
    trace: str


class PeerProcess:
    """Runs `serve(connection, *arguments)`; a context manager: it ends on exit.

    `serve` receives questions and replies to each, see `reply`; when the other side is gone, receiving ends it. All
    that is sent is pickled; tensors travel as shared memory. What is raised there is raised here, with the other
    process's traceback as a note.

    name: what it is, for the message of its end. environment: variables that it starts with.
    """

    def __init__(
        self, name: str, serve: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(serve, theirs, arguments), daemon=True)
        with _environment(environment or {}):
            self._process.start()
        theirs.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._connection.close()  # which the process takes for its end
        self._process.join(_CLOSING_S)
        self._process.kill()
        self._process.join()

    @property
    def process_id(self) -> int | None:
        """None when it has ended."""
        return self._process.pid if self._process.is_alive() else None

    def ask(self, question: Any) -> Any:
        """Send a question, and wait for the answer."""
        try:
            self._connection.send(question)
        except ConnectionError:
            self._raise_end()
        return self.answer()

    def answer(self) -> Any:
        """Wait for an answer. Raises: what was raised there; RuntimeError when the process has ended."""
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._raise_end()
        if isinstance(answer, _Raised):
            answer.error.add_note(answer.trace)
            raise answer.error
        return answer

    def _raise_end(self) -> NoReturn:
        self._process.join()
        raise RuntimeError(f"{self._name} has ended with exit code {self._process.exitcode}") from None


def reply(connection: Connection, answer: Callable[[], Any]) -> None:
    """In the process: send an answer, or what is raised in its place."""
    result: Any
    try:
        result = answer()
    except BaseException as error:  # noqa: BLE001  (raised on the other side)
        result = _Raised(error, traceback.format_exc())
    connection.send(result)


def _run(serve: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        serve(connection, *arguments)
    except (EOFError, BrokenPipeError):
        pass  # the other side is gone
    except BaseException as error:  # noqa: BLE001  (raised on the other side)
        connection.send(_Raised(error, traceback.format_exc()))


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set before the process imports anything."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
