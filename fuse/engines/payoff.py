"""Whether drafts pay, by what steps with them and steps without have brought of late.

Predicted times and chances say how far to draft, but not whether to draft at all: context grows, which makes steps
slower, widths that were not tried lie on no line with others, and chances change. So either way is tried now and then,
and compared with the steps just before. How often follows from what the last trials lost, so that all of them lose a
small part of the time. What one size of the batch has shown counts for its neighbours, for none lasts long in rollouts.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import NamedTuple

GAIN = 1.03
"""By which drafts must be faster than none: what is saved must not be noise."""
_TRIED, _TRIED_PLAINLY = 3, 5
"""Steps of a trial of drafts, at least, and of one without, whose steps take less and tell less."""
_DRAFTED_FOR = 24
"""Samples, counted in each step, of a trial of drafts: how many of them are right is chance."""
_COMPARED = _DRAFTED_FOR
"""Steps either way that are compared, at most: all of a trial for one sample."""
_SHARE = 0.0075
"""Of the time, for trials."""
_LEAST_LOST = 0.05
"""Part of a trial that is taken to be lost at least, so that what is about even is not tried all the time."""
_SLOW = 2.0
"""Times the median beyond which a step does not count: it was held up by something else."""
_KEPT = 5
"""Latest comparisons of a size that count."""
_FALLS, _FALLS_WORTH = 0.15, 0.5
"""Power of the batch as which gains fall before any were seen, and the weighed squares of log sizes that this is worth.
They never rise: a step that is wide by samples leaves less room to be wide by drafts."""


class Gains:
    """How many times as many tokens a second drafts bring in batches of each size, as comparisons have shown.

    The logarithm is on a line over that of the size, fitted to the median of the latest comparisons of each size by
    least squares, for each size anew: near ones count more, so that a size follows its own where it has some.
    """

    def __init__(self) -> None:
        self._compared: dict[int, deque[float]] = {}  # logarithms, by size of the batch
        self._fitted: dict[int, float] = {}  # since the last comparison: steps ask several times each

    def learn(self, batch: int, gain: float) -> None:
        self._compared.setdefault(batch, deque(maxlen=_KEPT)).append(math.log(gain))
        self._fitted.clear()

    def known(self, batch: int) -> float:
        """Comparisons of this size, and of others by nearness."""
        return sum(len(logs) * _nearness(batch, size) for size, logs in self._compared.items())

    def of(self, batch: int) -> float:
        """1 as long as nothing was compared."""
        if not self._compared:
            return 1.0
        if batch not in self._fitted:
            self._fitted[batch] = self._fit(batch)
        return self._fitted[batch]

    def _fit(self, batch: int) -> float:
        points = [
            (math.log(size / batch), statistics.median(logs), len(logs) * _nearness(batch, size))
            for size, logs in self._compared.items()
        ]
        middle, level = (sum(point[axis] * point[2] for point in points) / self.known(batch) for axis in (0, 1))
        spread = sum(weight * (place - middle) ** 2 for place, _, weight in points)
        together = sum(weight * (place - middle) * (log - level) for place, log, weight in points)
        slope = min(0.0, (together - _FALLS * _FALLS_WORTH) / (spread + _FALLS_WORTH))
        return math.exp(level - slope * middle)

    @property
    def highest(self) -> float:
        """In the smallest batch that was compared."""
        return self.of(min(self._compared, default=1))


def _nearness(batch: int, other: int) -> float:
    """How much a comparison of the one size counts for the other: a fourth for twice as many samples."""
    ratio = min(batch, other) / max(batch, other)
    return ratio * ratio


class Payoff:
    """Of an engine's batches, which are decoded the one way for some steps and then the other, at first plainly."""

    def __init__(self) -> None:
        self._gains = Gains()
        self._batch = 0
        self._before: deque[_Step] = deque()
        self._latest: deque[_Step] = deque()
        self._is_drafting = False
        self._step_s: dict[bool, float] = {}  # either way
        self._prepare_s = self._waited_s = 0.0

    def drafts_next(self, batch: int) -> bool:
        """How the next step goes, over so many samples."""
        if batch != self._batch:
            self._batch = batch
            self._before, self._latest = deque(), deque(maxlen=_COMPARED)
            self._is_drafting = self._pays
        if len(self._latest) < self._enough(drafts=self._is_drafting):
            return self._is_drafting
        if self._is_drafting == self._pays and self._is_due:
            self._waited_s = 0.0
            return not self._pays
        return self._pays

    def learn(self, tokens: int, prepare_s: float, seconds: float, *, is_drafting: bool) -> None:
        """What a step has brought, and what it took, beside what drafts took beforehand."""
        if is_drafting != self._is_drafting:
            self._is_drafting = is_drafting
            self._before, self._latest = self._latest, deque(maxlen=_COMPARED)
        self._latest.append(_Step(tokens, seconds))
        self._step_s[is_drafting] = statistics.median(step.seconds for step in self._latest)
        self._waited_s += seconds
        self._prepare_s += prepare_s
        if self._is_tried:
            ratio = _tokens_per_s(self._latest) / _tokens_per_s(self._before)
            self._gains.learn(self._batch, ratio if is_drafting else 1 / ratio)
            if self._gains.highest <= GAIN:  # else smaller batches will want what was prepared
                self._waited_s -= self._prepare_s / _SHARE
            self._prepare_s = 0.0

    def _enough(self, *, drafts: bool) -> int:
        """Steps that tell how fast either way is."""
        return max(_TRIED, math.ceil(_DRAFTED_FOR / self._batch)) if drafts else _TRIED_PLAINLY

    @property
    def _pays(self) -> bool:
        return self._gains.of(self._batch) > GAIN

    @property
    def _is_due(self) -> bool:
        """Whether the other way is to be tried: it loses little, or next to nothing is known of such batches."""
        if self._gains.known(self._batch) < 1:
            return True
        gain, other = self._gains.of(self._batch), not self._is_drafting
        lost = max(_LEAST_LOST, 1 - (gain if other else 1 / gain))
        return _SHARE * self._waited_s >= self._enough(drafts=other) * self._step_s[other] * lost

    @property
    def _is_tried(self) -> bool:
        """Whether the latest steps end a trial, with enough steps of the other way before it."""
        other = len(self._before) >= self._enough(drafts=not self._is_drafting)
        return self._is_drafting != self._pays and other and len(self._latest) == self._enough(drafts=self._is_drafting)


class _Step(NamedTuple):
    tokens: int
    seconds: float


def _tokens_per_s(steps: deque[_Step]) -> float:
    slow_s = _SLOW * statistics.median(step.seconds for step in steps)
    counted = [step for step in steps if step.seconds <= slow_s]
    return sum(step.tokens for step in counted) / sum(step.seconds for step in counted)
