"""What the first process of an engine is told, the others do: in order, to the end, and never longer than it lives."""

from __future__ import annotations

import threading
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest

from fuse.engines import lockstep
from fuse.engines.lockstep import Follower, Group, Leader, Place

KEY = b"key"


class Notes:
    """Remembers what it was told."""

    def __init__(self, place: Place, told: list[Any]) -> None:
        self.place, self.told = place, told

    def note(self, *args: Any) -> None:
        self.told.append((self.place.rank, *args))

    def fail(self) -> None:
        raise KeyError("no such block")

    def close(self) -> None:
        self.note("closed")


def follow(told: list[Any]) -> tuple[Follower, threading.Thread]:
    follower = Follower("127.0.0.1", KEY)

    def run() -> None:
        try:
            follower.follow(lambda place: Notes(place, told))
        except (KeyError, EOFError):
            told.append("failed")

    thread = threading.Thread(target=run)
    thread.start()
    return follower, thread


def test_followers_do_what_they_are_told_in_order() -> None:
    told: list[list[Any]] = [[], []]
    followers = [follow(notes) for notes in told]
    leader = Leader(Group(tuple(one.address for one, _ in followers), KEY))
    assert (leader.place.rank, leader.place.size) == (0, 3)
    for number in range(20):
        leader.tell("note", number)
    meeting = Path(leader.place.address.removeprefix("file://")).parent
    assert meeting.is_dir()
    leader.wait()
    assert not meeting.exists(), "they have met"
    expected = [[(rank, number) for number in range(20)] for rank in (1, 2)]
    assert told == expected, "to wait is to see all of it done"
    leader.close()
    for _, thread in followers:
        thread.join()
    assert told == [[*notes, (rank, "closed")] for rank, notes in zip((1, 2), expected, strict=True)]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where a process would have ended."""
    ended = threading.Event()
    monkeypatch.setattr(lockstep, "_GRACE_S", 0.0)
    monkeypatch.setattr(lockstep.os, "_exit", lambda status: ended.set())
    return ended


def test_a_follower_that_fails_takes_its_leader_with_it(
    ends: threading.Event, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []
    follower, thread = follow(told)
    leader = Leader(Group((follower.address,), KEY))
    leader.tell("fail")
    ends.wait()
    thread.join()
    for reader in threading.enumerate():
        if reader.name == "lockstep":
            reader.join()  # either end of the line may have been first
    assert told == ["failed"]
    assert "a process that shares this engine has failed: KeyError: 'no such block'" in capfd.readouterr().err


def test_a_leader_that_is_gone_takes_its_follower_with_it(ends: threading.Event) -> None:
    told: list[Any] = []
    follower, thread = follow(told)
    with Client(follower.address, authkey=KEY) as connection:
        connection.send(Place(1, 2, "file:///none"))
        connection.send(("note", (7,)))
    ends.wait()
    thread.join()
    assert told == [(1, 7), "failed"]
