"""How long a search may take."""

from __future__ import annotations

import time
from collections.abc import Callable


class SearchTime:
    """Seconds from now on, by a clock; what the parts of a search do not use is left for those after them."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end_s = clock, clock() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - self._clock())

    @property
    def is_over(self) -> bool:
        return self.left_s == 0.0

    def part(self, share: float) -> SearchTime:
        """A share of what is left."""
        return SearchTime(share * self.left_s, self._clock)
