"""Waiting for calls, without any."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from fuse.termination import raise_in_main_thread, raised_on_sigterm
from fuse.workers import calls
from fuse.workers.calls import Future, PendingCalls, wait_ended
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


class Reference:
    """Of a call that ends when the test says so."""

    def _on_completed(self, end: Callable[[Any], None]) -> None:
        self.end = end


class Counted(Future[Any]):
    """Counts how often calls are asked whether they have ended."""

    num_asked = 0

    @property
    def has_ended(self) -> bool:
        Counted.num_asked += 1
        return super().has_ended


def called(kind: type[Future[Any]] = Future) -> tuple[Future[Any], Reference]:
    reference: Any = Reference()
    worker: Any = None
    return kind(worker, reference), reference


def test_ends_of_calls_are_heard_in_their_order_and_once() -> None:
    (first, of_first), (second, of_second), (third, _) = called(), called(), called()
    heard: list[str] = []
    of_second.end("early")
    pending = PendingCalls()
    for name, future in (("first", first), ("second", second), ("third", third)):
        pending.expect(future, partial(heard.append, name))
    for then in pending.heard(0.0):
        then()
    assert heard == ["second"]
    assert second.result() == "early"
    ending = threading.Thread(target=of_first.end, args=[1])
    ending.start()
    for then in pending.heard():
        then()
    ending.join()
    assert heard == ["second", "first"]
    assert pending.heard(0.0) == []
    assert len(pending) == 1


def test_an_answer_asks_no_call_whether_it_has_ended() -> None:
    pending = PendingCalls()
    calls = [called(Counted) for _ in range(8)]
    for future, _ in calls:
        pending.expect(future, lambda: None)
    before = Counted.num_asked
    for index in (5, 2):
        calls[index][1].end(0)
        assert len(pending.heard(0.0)) == 1
    assert Counted.num_asked == before
