"""What a run is doing at the moment, for people: told when it changes, and again while it lasts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_logger = logging.getLogger(__name__)

SILENCE_S = 5.0
"""The longest that listeners hear nothing."""
_BRIEF_S = 1.0
"""What takes less is not worth a line of its own."""
_TICK_S = 0.25

Listener = Callable[[str], None]
"""Called with a line of text, from whatever thread."""


class Activity:
    """Passes on what it is told, to the log and to listeners: other work within a second of the last line, more of the
    same within `SILENCE_S`, with the seconds that it has taken.

    A text says what is done and, behind a colon, how far it is: `generating: 12 of 32 samples`.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = [_logger.info]
        self._lock = threading.Lock()
        self._text = self._work = self._told_work = self._part_of = ""
        self._since_s = self._told_s = 0.0
        self._lasts = False

    def listen(self, listener: Listener) -> None:
        """Have `listener` called from now on."""
        self._listeners.append(listener)

    def tell(self, text: str) -> None:
        """Say what is being done from now on."""
        text = self._part_of + text
        with self._lock:
            self._text, work = text, text.partition(":")[0]
            if work != self._work:
                self._work, self._since_s = work, time.monotonic()
            self._pass_on_what_is_due()

    @contextmanager
    def part_of(self, text: str) -> Iterator[None]:
        """Begin with `text` all that is told in the body."""
        before, self._part_of = self._part_of, f"{text}, "
        try:
            yield
        finally:
            self._part_of = before

    @contextmanager
    def lasting(self) -> Iterator[None]:
        """Pass on what is told in the body, for as long as it runs; inside of another such body, that one does."""
        if self._lasts:
            yield
            return
        self._lasts = True
        try:
            with repeated(self._pass_on, _TICK_S, name="activity"):
                yield
        finally:
            self._lasts, self._work, self._told_work = False, "", ""

    def _pass_on(self) -> None:
        with self._lock:
            self._pass_on_what_is_due()

    def _pass_on_what_is_due(self) -> None:
        now_s = time.monotonic()
        patience_s = _BRIEF_S if self._work != self._told_work else SILENCE_S - 2 * _TICK_S
        if not self._work or now_s - self._told_s < patience_s:
            return
        taken_s = now_s - self._since_s
        text = f"{self._text} ({taken_s:.0f} s)" if taken_s > 2 * _BRIEF_S else self._text
        self._told_work, self._told_s = self._work, now_s
        for listener in self._listeners:
            listener(text)


@contextmanager
def repeated(call: Callable[[], object], every_s: float, *, name: str) -> Iterator[None]:
    """Call again and again, in a thread of this name, until the body ends."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(every_s):
            call()

    thread = threading.Thread(target=go_on, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def silent(text: str) -> None:
    """Listens to nothing: what takes a `tell` does without."""
