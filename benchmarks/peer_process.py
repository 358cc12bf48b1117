"""A process of its own that answers what it is asked, one question at a time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, NoReturn, Self
from unittest import mock

from fuse.workers.errors import RunError

_SPAWN = multiprocessing.get_context("spawn")
_STARTED_AGAIN = 64
"""The exit code of `end_if_started_again`."""


def end_if_started_again() -> None:
    """End a process that a `PeerProcess` has begun to start, where it comes here before it is there.

    It begins by importing the program's script, and one that is not guarded does all its work anew: it would start
    more of everything, and wait for ever. The program then says so.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(_STARTED_AGAIN)


class PeerProcess:
    """Runs `serve(connection, *arguments)`; a context manager: it ends on exit.

    `serve` receives questions and sends an answer to each; when the other side is gone, receiving ends it. All that is
    sent is pickled; tensors travel as shared memory. What is raised there is raised here, with the other process's
    traceback as a note.

    name: what it is, for the message of its end. environment: variables that it starts with, before it imports
    anything. context: how it is started; by default as the program is, from nothing. closing_s: what closing, as of an
    engine, may take.
    """

    def __init__(
        self,
        name: str,
        serve: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        context: BaseContext | None = None,
        closing_s: float = 60.0,
    ) -> None:
        self._name, self._closing_s = name, closing_s
        context = context or _SPAWN
        self._connection, theirs = context.Pipe()
        self._process: Any = context.Process(target=_run, args=(serve, theirs, arguments), daemon=True)  # type: ignore[attr-defined]
        with mock.patch.dict(os.environ, environment or {}):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._connection.close()  # which the process takes for its end
        self._process.join(self._closing_s)
        self._process.kill()
        self._process.join()

    @property
    def process_id(self) -> int | None:
        """None when it has ended."""
        return self._process.pid if self._process.is_alive() else None

    def ask(self, question: Any) -> Any:
        """Send a question, and wait for the answer."""
        self.send(question)
        return self.answer()

    def send(self, question: Any) -> None:
        """Raises: RunError when the process has ended."""
        try:
            self._connection.send(question)
        except ConnectionError:
            self._raise_end()

    def answer(self) -> Any:
        """Wait for an answer. Raises: what was raised there; RunError when the process has ended."""
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._raise_end()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _raise_end(self) -> NoReturn:
        self._process.join()
        if self._process.exitcode == _STARTED_AGAIN:
            raise RunError(
                f"{self._name} cannot start: it imports this program's script, which then starts everything again: "
                'put what the script does under if __name__ == "__main__":'
            ) from None
        raise RunError(f"{self._name} has ended with exit code {self._process.exitcode}") from None


def _run(serve: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]) -> None:
    try:
        serve(connection, *arguments)
    except (EOFError, BrokenPipeError):
        pass  # the other side is gone
    except BaseException as error:  # noqa: BLE001  (raised on the other side)
        error.add_note(traceback.format_exc())
        connection.send(error)
