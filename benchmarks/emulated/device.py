"""The time line of an emulated device: operations follow one another, and each lasts as long as it should."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from fuse.trace import now_s

_MOST_AHEAD_S = 0.1
"""That may be queued."""


class EmulatedDevice:
    """Waits in place of computing.

    As on a GPU's stream, an operation starts when the one before it has ended and its input is there, also where the
    host comes a little late to start it: what this machine oversleeps is caught up with, and does not add up. Where the
    host is behind for good, operations end late, and so does whatever is measured. Whatever may be queued, as it may on
    a stream, costs the host no sleep of its own: one machine is the host of all devices.

    Times are of `now`, seconds; by default of a clock that all processes of the host share. It is a `fuse.trace.Clock`.
    """

    def __init__(
        self, now: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
    ) -> None:
        self._now, self._sleep = now, sleep
        self.free_s = now()
        """When it has done what it was given so far."""

    def resume(self) -> None:
        """It has been idle until now, if it is not busy."""
        self.reach(self._now())

    def reach(self, moment_s: float) -> None:
        """Have what comes next start no earlier than this."""
        self.free_s = max(self.free_s, moment_s)

    def work(self, seconds: float) -> None:
        """Be busy for so long; returns when that has ended."""
        self.free_s += seconds
        self.finish()

    def queue(self, seconds: float) -> None:
        """Be busy for so long; returns at once, unless the host is as far ahead as it may be."""
        self.free_s += seconds
        if (left_s := self.free_s - self._now()) > _MOST_AHEAD_S:
            self._sleep(left_s - _MOST_AHEAD_S / 2)

    def finish(self) -> None:
        """Wait until all of it has ended."""
        if (left_s := self.free_s - self._now()) > 0:
            self._sleep(left_s)

    def mark(self) -> float:
        return self.free_s

    def seconds(self, marks: Sequence[float]) -> list[float]:
        shift_s = now_s() - time.monotonic()
        return [mark + shift_s for mark in marks]
