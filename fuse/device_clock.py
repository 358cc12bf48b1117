"""The clock of a device: a GPU's moments are events, which it reaches long after the host has asked for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fuse.trace import Clock, HostClock, now_s


class CudaClock:
    """Of a GPU: moments are events on its current stream. Its own time line, anchored at the host's by `seconds`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._anchor()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        for mark in marks:
            mark.synchronize()
        told = [self._anchor_s + self._anchored.elapsed_time(mark) / 1e3 for mark in marks]
        self._anchor()  # so that the two clocks cannot run apart for long
        return told

    def _anchor(self) -> None:
        torch.cuda.synchronize(self._device)
        self._anchored, self._anchor_s = self.mark(), now_s()


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()
