"""A turn: one iteration of one trainer, of which several live side by side and iterate in turn.

So a machine that slows down does so for all variants alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fuse.benchmarks.measure import peak_memory, reset_peak_memory


@dataclass(frozen=True, slots=True)
class Response:
    """What one sample of a round was: its prompt, and its response without padding."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One iteration of one variant, with everything that belongs to it.

    metrics: as logged. phases: seconds, of which `other` is the rest. idle_share: by device. outside_share: of the
    iteration, in which no device computed; None where there are no spans to tell. exposed_s: seconds by kind of work
    that the iteration waited for. bubbles: idle shares of the devices while they train; peak_bytes: resident memory of
    the largest process, by role. simulated_phases: seconds that are predicted of an emulated one.
    """

    seconds: float
    responses: tuple[Response, ...]
    metrics: Mapping[str, float]
    phases: Mapping[str, float]
    idle_share: Mapping[str, float] = field(default_factory=dict)
    outside_share: float | None = None
    exposed_s: Mapping[str, float] = field(default_factory=dict)
    bubbles: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    simulated_phases: Mapping[str, float] = field(default_factory=dict)


Variant = Callable[[tuple[Response, ...] | None], Turn]
"""Takes one iteration of a trainer, given what other variants generated from its prompts; the first is given None."""


class PeakMemory:
    """Largest resident memory of processes from here on, by role."""

    def __init__(self, process_ids: Mapping[str, Sequence[int]]) -> None:
        self._process_ids = process_ids
        for process_id in itertools.chain.from_iterable(process_ids.values()):
            reset_peak_memory(process_id)

    def read(self) -> dict[str, int]:
        return {role: max(map(peak_memory, process_ids)) for role, process_ids in self._process_ids.items()}
