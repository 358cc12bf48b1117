"""Messages between emulated stages: nothing but the moment at which they arrive, through pipes of the host."""

from __future__ import annotations

import json
import os
import select
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fuse.benchmarks.emulated.device import EmulatedDevice

_MOST_BYTES = 1 << 16
"""That a pipe holds."""

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
    """What a rank's process is sent, through a pipe in a directory that all ranks' processes see.

    A pipe holds far more than what is under way at once, so that nobody waits for who reads seldom. Writes that are as
    short as these are never mixed. timeout_s: how long a number may take from the moment it is waited for.
    """

    def __init__(self, directory: Path, rank: int, timeout_s: float) -> None:
        self._directory, self._rank, self._timeout_s = directory, rank, timeout_s
        self._values: defaultdict[Key, deque[float]] = defaultdict(deque)
        self._unread = b""
        self._path = directory / str(rank)
        os.mkfifo(self._path)
        self._own = os.open(self._path, os.O_RDWR)  # a pipe that this end alone holds open stays open
        self._others: dict[int, int] = {}

    def send(self, rank: int, key: Key, value: float) -> None:
        if rank not in self._others:
            self._others[rank] = os.open(self._directory / str(rank), os.O_WRONLY)
        os.write(self._others[rank], json.dumps([key, value]).encode() + b"\n")

    def receive(self, key: Key) -> float:
        """Raises: TimeoutError when it does not come in time."""
        latest_s = time.monotonic() + self._timeout_s
        values = self._values[key]
        while not values:
            left_s = max(0.0, latest_s - time.monotonic())
            if not select.select([self._own], [], [], left_s)[0]:
                raise TimeoutError(f"rank {self._rank}: no message {key} within {self._timeout_s:g} s")
            self._read()
        return values.popleft()

    def close(self) -> None:
        """Hear no more."""
        for file in (self._own, *self._others.values()):
            os.close(file)
        self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        """Whatever has come."""
        *lines, self._unread = (self._unread + os.read(self._own, _MOST_BYTES)).split(b"\n")
        for line in lines:
            key, value = json.loads(line)
            self._values[tuple(key)].append(value)


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
    """The latest of all ranks' moments, each of which calls this: a barrier in emulated time.

    The first rank hears of all and tells all: one machine carries the messages of every rank.
    """
    if rank:
        post.send(0, ("own", rank), moment_s)
        return post.receive(("latest",))
    found_s = max([moment_s, *(post.receive(("own", other)) for other in range(1, num_ranks))])
    for other in range(1, num_ranks):
        post.send(other, ("latest",), found_s)
    return found_s
