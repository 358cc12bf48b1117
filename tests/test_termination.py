"""SIGTERM in this process: as a request, twice, too late, and as what another thread raises."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from fuse.termination import Terminated, graceful_termination, raise_in_main_thread, raised_on_sigterm

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def _handlers_are_given_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_a_request_first_and_an_order_the_second_time(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Terminated) as ended, graceful_termination(PATIENCE_S) as termination:
        assert not termination.is_requested
        terminate()
        assert termination.is_requested
        terminate()
    assert ended.value.code == 143
    assert [record.message for record in caplog.records] == [
        "SIGTERM: the run ends with this update, or in 60 s without it"
    ]


def test_a_request_is_an_order_once_its_time_is_over() -> None:
    with pytest.raises(Terminated, match="terminated before the update ended"), graceful_termination(0.0):
        terminate()
        threading.Event().wait(PATIENCE_S)
        raise AssertionError("nothing has interrupted the main thread")


def test_without_anything_to_finish_it_ends_at_once() -> None:
    with pytest.raises(Terminated, match="terminated"), raised_on_sigterm():
        terminate()


def test_another_thread_raises_in_the_main_one() -> None:
    with pytest.raises(KeyError, match="of a thread"), graceful_termination(PATIENCE_S) as termination:
        threading.Thread(target=raise_in_main_thread, args=(KeyError("of a thread"),)).start()
        threading.Event().wait(PATIENCE_S)
    assert not termination.is_requested


def test_other_threads_hear_nothing_of_signals() -> None:
    entered: list[bool] = []

    def enter() -> None:
        with graceful_termination(PATIENCE_S) as termination:
            entered.append(termination.is_requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [False]
