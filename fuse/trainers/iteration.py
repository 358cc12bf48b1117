"""What one update of a run was: for whoever measures runs, or shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fuse.sample import Sample
from fuse.trace import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """An update that is over.

    update: its number in the run, from 1. samples: the batch, scored. metrics: as logged. phases: seconds by name.
    tracks: what ran, by device and worker.
    """

    update: int
    samples: Sequence[Sample]
    metrics: Mapping[str, float]
    phases: Mapping[str, float]
    tracks: Mapping[str, Mapping[str, Sequence[Span]]]
