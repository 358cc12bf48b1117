"""Messages between emulated stages: nothing but the moment at which they arrive, over sockets of the host."""

from __future__ import annotations

import json
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fuse.benchmarks.emulated.device import EmulatedDevice

_MOST_BYTES = 1 << 12

Key = tuple[int | str, ...]
"""What a number is sent under."""


class Post(Protocol):
    """Carries numbers between ranks, in the order sent."""

    def send(self, rank: int, key: Key, value: float) -> None:
        """Let a rank have a number; returns at once."""
        ...

    def receive(self, key: Key) -> float:
        """The next number sent here under this key; waits for it."""
        ...


class Mailbox:
    """What a rank's process is sent, at a socket in a directory that all ranks' processes see.

    timeout_s: how long a number may take from the moment it is waited for.
    """

    def __init__(self, directory: Path, rank: int, timeout_s: float) -> None:
        self._directory, self._rank, self._timeout_s = directory, rank, timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address(rank))
        self._values: defaultdict[Key, deque[float]] = defaultdict(deque)
        self._changed = threading.Condition()
        # Senders wait for whoever leaves more than a few unread.
        self._reader = threading.Thread(target=self._read, name="mailbox", daemon=True)
        self._reader.start()

    def send(self, rank: int, key: Key, value: float) -> None:
        self._socket.sendto(json.dumps([key, value]).encode(), self._address(rank))

    def receive(self, key: Key) -> float:
        """Raises: TimeoutError when it does not come in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._values[key], self._timeout_s):
                raise TimeoutError(f"rank {self._rank}: no message {key} within {self._timeout_s:g} s")
            return self._values[key].popleft()

    def close(self) -> None:
        """Hear no more."""
        self._socket.sendto(b"", self._address(self._rank))
        self._reader.join()
        self._socket.close()
        with suppress(FileNotFoundError):
            Path(self._address(self._rank)).unlink()

    def _read(self) -> None:
        while data := self._socket.recv(_MOST_BYTES):
            key, value = json.loads(data)
            with self._changed:
                self._values[tuple(key)].append(value)
                self._changed.notify_all()

    def _address(self, rank: int) -> str:
        return str(self._directory / str(rank))


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message that nobody waits for."""

    end_s: float

    def wait(self) -> float:
        return self.end_s


@dataclass(frozen=True, slots=True)
class _Coming:
    """A message on its way."""

    key: Key
    post: Post
    device: EmulatedDevice

    def wait(self) -> float:
        """Have the device wait for it, too; returns when it arrives."""
        arrival_s = self.post.receive(self.key)
        self.device.reach(arrival_s)
        return arrival_s


class EmulatedCommunicator:
    """Of a pipeline in one direction, as `fuse.intrastage.communication.Communicator`. What is sent is a moment.

    ranks: of the stages. seconds: that the message of a micro-batch takes.
    """

    def __init__(
        self,
        pipeline: int,
        ranks: Sequence[int],
        step: int,
        *,
        post: Post,
        device: EmulatedDevice,
        seconds: Callable[[int], float],
    ) -> None:
        self._pipeline, self._ranks, self._step = pipeline, ranks, step
        self._post, self._device, self._seconds = post, device, seconds

    def send(self, end_s: float, *, stage: int, micro_batch: int, op: str) -> _Sent:
        receiver = stage + self._step
        self._post.send(self._ranks[receiver], self._key(receiver, micro_batch), end_s + self._seconds(micro_batch))
        return _Sent(end_s)

    def receive(self, buffer: Any, *, stage: int, micro_batch: int, op: str) -> _Coming:
        return _Coming(self._key(stage, micro_batch), self._post, self._device)

    def _key(self, receiver: int, micro_batch: int) -> Key:
        return self._pipeline, self._step, receiver, micro_batch


def latest(moment_s: float, rank: int, num_ranks: int, post: Post) -> float:
    """The latest of all ranks' moments, each of which calls this: a barrier in emulated time."""
    others = [other for other in range(num_ranks) if other != rank]
    for other in others:
        post.send(other, ("latest", rank), moment_s)
    return max([moment_s, *(post.receive(("latest", other)) for other in others)])
