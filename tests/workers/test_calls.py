"""Waiting for calls, without any."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fuse.termination import raise_in_main_thread, raised_on_sigterm
from fuse.workers import calls
from fuse.workers.calls import wait_ended
from fuse.workers.errors import ClusterError


class Never:
    """A call that does not end; Ray does, once somebody waits."""

    def __init__(self) -> None:
        self.end = threading.Thread(target=self._end)

    @property
    def has_ended(self) -> bool:
        if self.end.ident is None:
            self.end.start()
        return False

    def _end(self) -> None:
        with calls._ended:  # which is free as soon as the wait begins
            raise_in_main_thread(ClusterError("Ray has ended"))


def test_a_wait_without_limit_is_interrupted_by_what_ends_the_run() -> None:
    call: Any = Never()
    with raised_on_sigterm(), pytest.raises(ClusterError, match="Ray has ended"):
        wait_ended([call])
    call.end.join()
