"""Processes that share an engine: what the first of them is told, it tells the others, and all do it in the same order.

Their collectives find one another without further words, for every process computes the same plan of what to run. One
that dies would leave the others waiting inside native code, so they end with it: an engine dies as a whole.
"""

from __future__ import annotations

import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

_GRACE_S = 2.0
"""For a process to say itself what went wrong with it, when another that failed has told first."""

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Place:
    """A process's among the `size` that share an engine, all on one host.

    address: the URL of a file by which torch.distributed lets them meet, gone once they have.
    """

    rank: int
    size: int
    address: str


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of an engine as its first one is told of them.

    followers: where the others listen. key: by which they know each other.
    """

    followers: tuple[Address, ...]
    key: bytes


@dataclass(frozen=True, slots=True)
class _Failure:
    """What ended the process at the other end."""

    text: str


@dataclass(frozen=True, slots=True)
class _End:
    """Nothing follows."""


class _Line:
    """A connection that a thread reads; with the process at its other end, this one ends, unless it has hung up."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._is_open = True
        self.is_lost = threading.Event()  # the process at the other end has ended without a word
        threading.Thread(target=self._read, name="lockstep", daemon=True).start()

    def send(self, pickled: Any) -> None:
        self._connection.send_bytes(pickled)

    def receive(self) -> Any:
        """The next message. Raises: EOFError when there will be none."""
        if isinstance(message := self._received.get(), _Failure):
            raise EOFError(message.text)
        return message

    def hang_up(self, *last: Any) -> None:
        """Send the last messages; the other end may end, or have ended."""
        self._is_open = False
        with suppress(OSError):
            for message in (*last, _End()):
                self.send(ForkingPickler.dumps(message))

    def _read(self) -> None:
        try:
            while not isinstance(message := self._connection.recv(), _Failure | _End):
                self._received.put(message)
        except (EOFError, OSError):
            message = _Failure("its process has ended")
            self.is_lost.set()
        self._connection.close()
        if isinstance(message, _End):
            return
        self._received.put(message)
        if self._is_open:
            time.sleep(_GRACE_S)
        if self._is_open:
            print(f"a process that shares this engine has failed: {message.text}", file=sys.stderr, flush=True)
            os._exit(1)


class Leader:
    """The first process's side. Raises: OSError when a follower is not there."""

    def __init__(self, group: Group) -> None:
        size = 1 + len(group.followers)
        self._meeting = tempfile.TemporaryDirectory(prefix="fuse-engine-")
        address = f"file://{self._meeting.name}/{Path(self._meeting.name).name}"  # engines' files have different names
        self.place = Place(0, size, address)
        self._lines: list[_Line] = []
        for rank, follower in enumerate(group.followers, start=1):
            self._lines.append(_Line(Client(follower, authkey=group.key)))
            self._lines[-1].send(ForkingPickler.dumps(Place(rank, size, address)))

    def tell(self, method: str, *args: Any) -> None:
        """Have the others do this after all that they were told before."""
        pickled = ForkingPickler.dumps((method, args))
        for line in self._lines:
            line.send(pickled)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What the body raises because another process has ended is not heard: this one ends, too."""
        try:
            yield
        except BaseException:
            if any(line.is_lost.wait(_GRACE_S) for line in self._lines):
                threading.Event().wait()  # for the thread that reads to end the process
            raise

    def wait(self) -> None:
        """Until the others have done all that they were told."""
        self.tell("answer")
        for line in self._lines:
            line.receive()
        self._meeting.cleanup()

    def close(self) -> None:
        """Let the others end."""
        self._meeting.cleanup()
        for line in self._lines:
            line.hang_up(("close", ()))


class Follower:
    """Another process's side: listens at `host` for a leader who knows `key`."""

    def __init__(self, host: str, key: bytes) -> None:
        self._listener = Listener((host, 0), authkey=key)
        self.address: Address = self._listener.address  # no path
        self.is_led = False

    def follow(self, make: Callable[[Place], Any]) -> None:
        """Make what has the methods that the leader names, and call them until it is told to `close`.

        Raises: what making it or a method raises; the leader's process ends.
        """
        with self._listener:
            line = _Line(self._listener.accept())
        self.is_led = True
        try:
            held = make(line.receive())
            while True:
                method, args = line.receive()
                if method == "answer":
                    line.send(ForkingPickler.dumps(None))
                    continue
                getattr(held, method)(*args)
                if method == "close":
                    return
        except BaseException as error:
            with suppress(OSError):  # the leader may be gone
                line.send(ForkingPickler.dumps(_Failure(f"{type(error).__name__}: {error}")))
            raise
