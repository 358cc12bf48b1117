"""Trainers that take turns: each runs its own `train()`, and waits before every iteration until it is called.

So that machines that slow down do so for all variants alike, trainers live side by side and iterate in turn. What is
timed runs from one request for prompts to the next: an iteration with everything that belongs to it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Response:
    """What one sample of a round was: its prompt, and its response without padding."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One iteration of one variant.

    metrics: as logged. phases: seconds, of which `other` is the rest. idle_share: by device. outside_share: of the
    iteration, in which no device computed; None where there are no spans to tell. bubbles: idle shares of the devices
    while they train; peak_bytes: resident memory of the largest process, by role.
    """

    seconds: float
    responses: tuple[Response, ...]
    metrics: Mapping[str, float]
    phases: Mapping[str, float]
    idle_share: Mapping[str, float]
    outside_share: float | None
    bubbles: Mapping[str, float]
    peak_bytes: Mapping[str, int]


class Variant(Protocol):
    """A trainer that has started and waits for its turn."""

    def turn(self, same: tuple[Response, ...] | None) -> Turn:
        """One iteration. same: what other variants generated from these prompts, None for the first."""
        ...


class Stopped(BaseException):
    """Ends a trainer's loop from within; no handler of errors is to take it for one."""


class Turnstile:
    """Between the thread that trains and the one that gives turns."""

    def __init__(self) -> None:
        self._tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._arrivals: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.start_s = self.end_s = 0.0

    def wait(self) -> None:
        """In the trainer: the last turn is over; wait for the next. Raises: Stopped when there is none."""
        self.end_s = time.time()
        self._arrivals.put(None)
        if not self._tickets.get():
            raise Stopped
        self.start_s = time.time()

    def fail(self, error: BaseException) -> None:
        """In the trainer: there will be no more turns."""
        self._arrivals.put(error)

    def arrive(self) -> None:
        """Outside: wait until the trainer waits. Raises: what the trainer raised."""
        error = self._arrivals.get()
        if error is not None:
            raise error

    def turn(self) -> None:
        """Outside: let the trainer iterate once, from `start_s` to `end_s`, by `time.time()`."""
        self._tickets.put(True)
        self.arrive()

    def stop(self) -> None:
        """Outside: give no more turns."""
        self._tickets.put(False)


class TrainingThread:
    """Runs `train`, which calls `turnstile.wait()` before each iteration; a context manager, ready inside."""

    def __init__(self, turnstile: Turnstile, train: Callable[[], None]) -> None:
        self._turnstile, self._train = turnstile, train
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        self._turnstile.arrive()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._turnstile.stop()
        if error is None:  # else it may never come to its end; its workers end with the cluster
            self._thread.join()

    def _run(self) -> None:
        try:
            self._train()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  (raised by the other thread)
            self._turnstile.fail(error)


class PeakMemory:
    """Largest resident memory of processes since the last `reset`, by role."""

    def __init__(self, process_ids: Mapping[str, list[int]]) -> None:
        self._process_ids = process_ids

    def reset(self) -> None:
        for process_ids in self._process_ids.values():
            for process_id in process_ids:
                Path(f"/proc/{process_id}/clear_refs").write_text("5")

    def read(self) -> dict[str, int]:
        return {role: max(map(_peak_bytes, process_ids)) for role, process_ids in self._process_ids.items()}


def _peak_bytes(process_id: int) -> int:
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"process {process_id} has ended")


def loader(turnstile: Turnstile, num_rounds: int, batch: Callable[[int], Any]) -> Iterator[Any]:
    """`batch(0)`, `batch(1)`, ..., each at its turn."""
    for round_index in range(num_rounds):
        turnstile.wait()
        yield batch(round_index)
    turnstile.wait()
    raise Stopped
