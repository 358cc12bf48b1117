"""SIGTERM, by which schedulers and clouds end a process: it raises, like Ctrl-C, or waits for what is being done."""

from __future__ import annotations

import _thread
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_logger = logging.getLogger(__name__)

STATUS = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """The process was asked to end. Uncaught, it ends with exit status 143; `text` says how far it got, in a line."""

    def __init__(self, text: str) -> None:
        super().__init__(STATUS)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Termination:
    """Whether the process was asked to end while something may be finished first.

    grace_s: after so long, or when asked again, `Terminated` is raised wherever the main thread is.
    """

    def __init__(self, grace_s: float) -> None:
        self.is_requested = False
        self._grace_s = grace_s
        self._timer: threading.Timer | None = None

    def request(self) -> None:
        """Raises: Terminated the second time."""
        if self.is_requested:
            raise Terminated("terminated before the update ended")
        self.is_requested = True
        _logger.warning("SIGTERM: the run ends with this update, or in %g s without it", self._grace_s)
        self._timer = threading.Timer(self._grace_s, _thread.interrupt_main, [signal.SIGTERM])
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


@contextmanager
def raised_on_sigterm() -> Iterator[None]:
    """In the body SIGTERM raises `Terminated`, so that everything is closed. Only the main thread hears of signals."""

    def end() -> None:
        raise Terminated("terminated")

    with _handled(end):
        yield


@contextmanager
def graceful_termination(grace_s: float) -> Iterator[Termination]:
    """In the body SIGTERM is a request to end soon; see `Termination`. The body looks at it between two steps."""
    termination = Termination(grace_s)
    try:
        with _handled(termination.request):
            yield termination
    finally:
        termination.close()


def raise_in_main_thread(error: BaseException) -> None:
    """From another thread, have the main one raise `error` wherever it is, while it handles SIGTERM as here."""
    global _failure
    _failure = error
    _thread.interrupt_main(signal.SIGTERM)


_failure: BaseException | None = None


@contextmanager
def _handled(handle: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        global _failure
        if _failure is not None:
            error, _failure = _failure, None
            raise error
        handle()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)  # None: not Python's own
