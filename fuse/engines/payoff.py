"""Whether drafts pay, by what steps with them and steps without have brought of late.

Predicted times and chances say how far to draft; whether to draft at all they say only until both ways were taken:
context grows, which makes steps slower, widths that were not tried lie on no line with others, and chances change. So
either way is tried again now and then, and compared with the steps just before. How often follows from what the last
trials lost, so that all of them lose a small part of the time.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

GAIN = 1.03
"""By which drafts must be faster than none: what is saved must not be noise."""
_TRIED = 3
"""Steps of a trial, at least."""
_DRAFTED_FOR = 24
"""Samples, counted in each step, of a trial of drafts: how many of them are right is chance."""
_COMPARED = 16
"""Steps before it that it is compared with, at most."""
_KEPT = 5
"""Comparisons whose median counts."""
_SHARE = 0.0075
"""Of the time, for trials."""
_LEAST_LOST = 0.05
"""Part of a trial that is taken to be lost at least, so that what is about even is not tried all the time."""
_SLOW = 2.0
"""Times the median as which a step counts at most: longer ones were held up by something else."""


class Prediction(NamedTuple):
    """Of steps with drafts: how many times as many tokens a second they bring, and the seconds of one."""

    gain: float
    seconds: float


class Payoff:
    """Of batches of one size, which are decoded the one way for some steps and then the other, at first plainly."""

    def __init__(self, batch: int) -> None:
        self._enough = {False: _TRIED, True: max(_TRIED, math.ceil(_DRAFTED_FOR / batch))}
        self._gains: deque[float] = deque(maxlen=_KEPT)
        self._prediction: Prediction | None = None
        self._before: deque[_Step] = deque()
        self._latest: deque[_Step] = deque(maxlen=_COMPARED)
        self._is_drafting = False
        self._step_s: dict[bool, float] = {}  # either way
        self._prepare_s = self._waited_s = 0.0

    def enter(self) -> None:
        """Batches of other sizes came in between."""
        self._before.clear()
        self._latest.clear()
        self._prediction = None
        self._is_drafting = bool(self._gains) and self._gain > GAIN

    def drafts_next(self, predict: Callable[[], Prediction]) -> bool:
        """How the next step goes."""
        if len(self._latest) < self._enough[self._is_drafting]:
            return self._is_drafting
        if not self._gains and self._prediction is None:
            self._prediction = predict()
            self._step_s[True] = self._prediction.seconds
        pays = self._gain > GAIN
        if self._is_drafting == pays and _SHARE * self._waited_s >= self._lost_s:
            self._waited_s = 0.0
            return not pays
        return pays

    def learn(self, tokens: int, prepare_s: float, seconds: float, *, is_drafting: bool) -> None:
        """What a step has brought, and what it took, beside what drafts took beforehand."""
        if is_drafting != self._is_drafting:
            self._is_drafting = is_drafting
            self._before, self._latest = self._latest, deque(maxlen=max(_COMPARED, self._enough[True]))
        self._latest.append(_Step(tokens, seconds))
        self._step_s[is_drafting] = statistics.median(step.seconds for step in self._latest)
        self._waited_s += seconds
        self._prepare_s += prepare_s
        if self._is_tried:
            ratio = _tokens_per_s(self._latest) / _tokens_per_s(self._before)
            self._gains.append(ratio if is_drafting else 1 / ratio)
            if is_drafting and self._gain <= GAIN:  # it was prepared for this trial alone
                self._waited_s -= self._prepare_s / _SHARE
            self._prepare_s = 0.0

    @property
    def _is_tried(self) -> bool:
        """Whether the latest steps end a trial, with enough steps of the other way before it."""
        is_new = not self._gains or self._is_drafting != (self._gain > GAIN)
        other = len(self._before) >= self._enough[not self._is_drafting]
        return is_new and other and len(self._latest) == self._enough[self._is_drafting]

    @property
    def _gain(self) -> float:
        if self._gains:
            return statistics.median(self._gains)
        assert self._prediction is not None
        return self._prediction.gain

    @property
    def _lost_s(self) -> float:
        """Seconds that a trial of the other way loses."""
        gain = 1 / self._gain if self._is_drafting else self._gain
        other = not self._is_drafting
        return self._enough[other] * self._step_s[other] * max(_LEAST_LOST, 1 - gain)


class _Step(NamedTuple):
    tokens: int
    seconds: float


def _tokens_per_s(steps: deque[_Step]) -> float:
    slow_s = _SLOW * statistics.median(step.seconds for step in steps)
    return sum(step.tokens for step in steps) / sum(min(step.seconds, slow_s) for step in steps)
