"""How many tokens to draft for each sample: as many as pay, by measured times and by what was right so far.

With a token's chance a of being right, j drafts bring a + a^2 + ... + a^j tokens beside the one that a step brings
anyway; they cost j steps of the draft and a wider step of the target. Of all sets of drafts, the best are those of
highest chance, so one pass over them finds the set of most tokens per second; often it is none.
Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", ICML 2023, section 3,
for one sample; several side by side and fitted times are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.engines.engine import GeneratedToken
from fuse.engines.rows import Rows

Floats = NDArray[np.float64]

_MOST = 8
"""Tokens drafted at once."""
_GAIN = 1.03
"""By which drafts must be faster than none: what is saved must not be noise."""
_REST_STEPS = 16
"""Without another thought after drafts did not pay, as long as the batch stays."""
_PRIOR, _PRIOR_TOKENS = 0.8, 16.0
"""Drafts that are right before any was seen, and how many seen ones that is worth."""
_SAMPLE_TOKENS = 8.0
"""What the chance of all counts against a sample's own drafts."""
_DECAY, _DECAY_OF_ALL = 0.9, 0.98
"""How fast a sample's own, and those of all, are forgotten, by draft."""
_FEW, _SLOWER = 3, 0.1
"""Times that make a size count, and how far a slower one is followed."""
_STALE_STEPS = 256
"""After which a time is not known any more, so that what was slow once is tried again."""


class Acceptance:
    """Chances of a draft's next token to be right: of all samples, and of each, with that of all as its prior."""

    def __init__(self) -> None:
        self._all = (_PRIOR * _PRIOR_TOKENS, _PRIOR_TOKENS)
        self._own: dict[int, tuple[float, float]] = {}

    def of(self, sample_id: int) -> float:
        everywhere = self._all[0] / self._all[1]
        right, tried = self._own.get(sample_id, (0.0, 0.0))
        return min((right + _SAMPLE_TOKENS * everywhere) / (tried + _SAMPLE_TOKENS), 0.999)

    def learn(self, sample_id: int, num_drafted: int, num_right: int) -> None:
        """A draft is tried up to its first wrong token."""
        num_tried = min(num_right + 1, num_drafted)
        right, tried = self._own.get(sample_id, (0.0, 0.0))
        self._own[sample_id] = (_DECAY * right + num_right, _DECAY * tried + num_tried)
        self._all = (_DECAY_OF_ALL * self._all[0] + num_right, _DECAY_OF_ALL * self._all[1] + num_tried)

    def forget(self, sample_id: int) -> None:
        self._own.pop(sample_id, None)


@dataclass(slots=True)
class _Timed:
    seconds: float
    count: int
    step: int  # of the latest


class StepTimes:
    """Seconds of a forward over so many tokens: of sizes timed lately, and on lines between and beyond these.

    The smallest size counts at once, or steps without drafts would seem to take what those with drafts do. Any other
    counts from its third time on, by the least that lately came again: of a few times that is the one that nothing else
    disturbed, and one that was slow once is not given up for it.

    slope: per token, as a share of the least time known, beyond the sizes that count.
    """

    def __init__(self, slope: float) -> None:
        self._slope = slope
        self._timed: dict[int, _Timed] = {}
        self._step = 0

    @property
    def is_known(self) -> bool:
        return bool(self._timed)

    def pass_step(self) -> None:
        """Times grow older."""
        self._step += 1
        for size in [size for size, timed in self._timed.items() if timed.step + _STALE_STEPS < self._step]:
            del self._timed[size]

    def learn(self, num_tokens: int, seconds: float) -> None:
        size = _rounded(num_tokens)
        timed = self._timed.setdefault(size, _Timed(seconds, 0, self._step))
        timed.seconds = min(seconds, timed.seconds + _SLOWER * (seconds - timed.seconds))
        timed.count, timed.step = timed.count + 1, self._step

    def of(self, num_tokens: Floats) -> Floats:
        """Pre: something is known."""
        sizes = sorted(self._timed)
        sizes = [size for size in sizes if size == sizes[0] or self._timed[size].count >= _FEW]
        times = np.maximum.accumulate([self._timed[size].seconds for size in sizes])
        beyond = np.maximum(num_tokens - sizes[-1], 0)
        seconds: Floats = np.interp(num_tokens, sizes, times) + self._slope * times[0] * beyond
        return seconds


def _rounded(num_tokens: int) -> int:
    """To four bits: sizes that take about as long count as one."""
    unit = 1 << max(0, num_tokens.bit_length() - 4)
    return -(-num_tokens // unit) * unit


class PayingLengths:
    """Drafts as many tokens as bring the most tokens per second.

    draft_share: what a step of the draft takes of one of the target, before one was timed; 0 if it never does.
    """

    def __init__(self, draft_share: float) -> None:
        self._draft_share = draft_share
        self._acceptance = Acceptance()
        self._target, self._draft = StepTimes(0.03), StepTimes(0.1)
        self._batch = self._rest = 0

    def choose(self, rows: Rows) -> Sequence[int]:
        batch = len(rows)
        if not self._target.is_known or (self._rest and batch == self._batch):
            self._rest = max(0, self._rest - 1)
            return [0] * batch
        self._batch = batch
        chances = np.array([self._acceptance.of(row.request.sample_id) for row in rows])
        most = np.array([min(row.num_left - 1, _MOST) for row in rows])
        counts = best_lengths(chances, most, self._target.of, self._draft_s)
        if not counts.any():
            self._rest = _REST_STEPS
        return [int(count) for count in counts]

    def learn(
        self, generated: Sequence[GeneratedToken], drafts: Sequence[Sequence[int]], draft_s: float, target_s: float
    ) -> None:
        for times in (self._target, self._draft):
            times.pass_step()
        num_drafted = sum(map(len, drafts))
        self._target.learn(len(drafts) + num_drafted, target_s)
        if num_drafted and self._draft_share:
            levels = max(map(len, drafts))
            self._draft.learn(max(1, round(num_drafted / levels)), draft_s / levels)
        counts: dict[int, int] = {}
        for token in generated:
            counts[token.sample_id] = counts.get(token.sample_id, 0) + 1
        for token in generated:
            if token.drafted_tokens:
                self._acceptance.learn(token.sample_id, token.drafted_tokens, counts[token.sample_id] - 1)
            if token.finished:
                self._acceptance.forget(token.sample_id)

    def _draft_s(self, num_tokens: Floats) -> Floats:
        return self._draft.of(num_tokens) if self._draft.is_known else self._draft_share * self._target.of(num_tokens)


def best_lengths(
    chances: Floats, most: NDArray[np.int64], target_s: Callable[[Floats], Floats], draft_s: Callable[[Floats], Floats]
) -> NDArray[np.int64]:
    """Tokens to draft for each sample so that a step brings the most tokens per second; none where that gains little.

    chances: of each sample's next draft to be right, below 1, [samples]. most: drafts that a sample has room for.
    target_s: seconds of a forward over so many tokens. draft_s: of a draft's step over so many samples.
    """
    num_samples, levels = len(chances), int(most.max())
    counts = np.zeros(num_samples, dtype=np.int64)
    level = np.arange(levels)
    gains = chances[:, None] ** (level + 1)
    sample, depth = np.nonzero(level < most[:, None])
    order = np.argsort(-gains[sample, depth], kind="stable")  # a sample's own come in order: each gains less
    sample, depth = sample[order], depth[order]
    added_s = np.zeros(len(order))
    for one in level:
        at = depth == one
        added_s[at] = np.diff(draft_s(1.0 + np.arange(at.sum(), dtype=np.float64)), prepend=0.0)
    tokens = num_samples + np.cumsum(gains[sample, depth])
    seconds = target_s(num_samples + 1.0 + np.arange(len(order), dtype=np.float64)) + np.cumsum(added_s)
    rates = tokens / seconds
    if len(rates) and rates.max() > _GAIN * num_samples / float(target_s(np.array([float(num_samples)]))[0]):
        np.add.at(counts, sample[: int(rates.argmax()) + 1], 1)
    return counts
