"""The model worker of an emulated device: it trains and scores by sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fuse.benchmarks.emulated.costs import EmulatedCosts
from fuse.benchmarks.emulated.device import EmulatedDevice
from fuse.benchmarks.emulated.messages import Mailbox
from fuse.benchmarks.emulated.training import EmulatedRound, train, walk
from fuse.trace import Span, SpanRecorder


class EmulatedModelWorker:
    """What a `ModelWorker` does that takes time.

    directory: where ranks find one another. timeout_s: how long they wait for a message.

    All ranks are made before one trains.
    """

    def __init__(self, rank: int, costs: EmulatedCosts, directory: Path, timeout_s: float) -> None:
        self._rank, self._costs = rank, costs
        self._device = EmulatedDevice()
        self._mailbox = Mailbox(directory, rank, timeout_s)
        self._recorder = SpanRecorder(self._device)
        self._num_inferences = 0

    def train(self, rounds: Sequence[EmulatedRound]) -> None:
        """Take all rounds of an update; all ranks are called at once."""
        self._device.resume()
        for one in rounds:
            train(one, self._rank, self._costs, self._device, self._mailbox, self._recorder)

    def accumulate(self, piece: EmulatedRound, category: str) -> None:
        """Train a piece before the update; all ranks of its replica are called at once. category: of its spans."""
        self._device.resume()
        walk(piece, self._rank, self._costs, self._device, self._mailbox, self._recorder, category)

    def infer(self, num_samples: int, num_tokens: int) -> None:
        """Score so many samples of so many tokens in all, by one model after the other."""
        self._num_inferences += 1
        self._device.resume()
        sizes = {"samples": num_samples, "tokens": num_tokens, "call": self._num_inferences}
        for role in self._costs.scoring:
            with self._recorder.span(role, "infer", **sizes):
                self._device.work(self._costs.scoring_s(role, num_tokens))

    def drain_spans(self) -> list[Span]:
        """Spans since the last call."""
        return self._recorder.drain()

    def close(self) -> None:
        """Leave the other ranks."""
        self._mailbox.close()
