"""What rollouts have taken by either way, fused and stage by stage, where simulations expect little of fusion.

A gain of a few percent is less than what simulations leave out of a controller's work on a busy host, so that there the
clock decides. A rollout counts by its seconds over those that stage by stage is simulated to take on the same lengths
by the costs of then, which leaves out how long responses were and how fast the machine was.
"""

from __future__ import annotations

import statistics
from collections import deque

_ENOUGH = 2
"""Rollouts of each way before the ways are compared."""
_CLEAR = 0.97
"""Of fused ones, below which stage by stage need not be tried: simulations of that are right to a few percent."""
_KEPT = 5
_TRIED_AGAIN_AFTER = 16
"""Rollouts of the way that is better: the machine may have changed."""


class Evidence:
    """Of the last rollouts of each way."""

    def __init__(self) -> None:
        self._shares = {is_fused: deque[float](maxlen=_KEPT) for is_fused in (True, False)}
        self._num_alike = 0
        self._was_fused = True

    def add(self, share: float, *, is_fused: bool) -> None:
        """A rollout's seconds over what stage by stage was simulated to take."""
        self._shares[is_fused].append(share)
        self._num_alike = self._num_alike + 1 if is_fused == self._was_fused else 1
        self._was_fused = is_fused

    @property
    def is_for_fusion(self) -> bool:
        """How the next one is to go: fused, until that is no clear gain; then the better way, at times the other."""
        fused, serial = self._shares[True], self._shares[False]
        if len(fused) < _ENOUGH or statistics.median(fused) < _CLEAR:
            return True
        if len(serial) < _ENOUGH:
            return False
        is_better = statistics.median(fused) <= statistics.median(serial)
        return is_better != (self._num_alike >= _TRIED_AGAIN_AFTER and self._was_fused == is_better)
