"""How many tokens to draft for each sample: as many as pay, by measured times and by what was right so far.

With a token's chance a of being right, j drafts bring a + a^2 + ... + a^j tokens beside the one that a step brings
anyway; they cost j steps of the draft and a wider step of the target. Of all sets of drafts up to some depth, the best
are those of highest chance, so one pass over them for each depth finds the set of most tokens per second. Whether it is
better than none, time tells (`payoff.py`).
Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", ICML 2023, section 3,
for one sample; several side by side and fitted times are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuse.engines.draft import Expected
from fuse.engines.engine import GeneratedToken
from fuse.engines.payoff import Payoff
from fuse.engines.rows import Rows

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

_MOST = 8
"""Tokens drafted at once."""
_PRIOR_TOKENS = 16.0
"""Seen ones that the chance is worth which is expected before any was seen."""
_SAMPLE_TOKENS = 8.0
"""What the chance of all counts against a sample's own drafts."""
_DECAY, _DECAY_OF_ALL = 0.9, 0.98
"""How fast a sample's own, and those of all, are forgotten, by draft."""
_FEW = 3
"""Times that make a size count."""
_FOLLOWED, _SLOW = 0.1, 2.0
"""How far later times are followed, and how many times as long as is known they count as at most."""
_STALE_STEPS = 256
"""With drafts, after which a time is not known any more, so that what was slow once is tried again."""


class Acceptance:
    """Chances of a draft's next token to be right: of all samples, and of each, with that of all as its prior.

    chance: expected before any was seen.
    """

    def __init__(self, chance: float) -> None:
        self._all = (chance * _PRIOR_TOKENS, _PRIOR_TOKENS)
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
    counts from its third time on, by the least of these, so that one that was slow once is not given up for it; later
    ones are followed slowly, as if they were at most twice as long.

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
        """Times grow older by a step with drafts."""
        self._step += 1
        for size in [size for size, timed in self._timed.items() if timed.step + _STALE_STEPS < self._step]:
            del self._timed[size]

    def learn(self, num_tokens: int, seconds: float) -> None:
        size = _rounded(num_tokens)
        timed = self._timed.setdefault(size, _Timed(seconds, 0, self._step))
        if timed.count < _FEW:
            timed.seconds = min(seconds, timed.seconds)
        else:
            timed.seconds += _FOLLOWED * (min(seconds, _SLOW * timed.seconds) - timed.seconds)
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


@dataclass(frozen=True, slots=True)
class DraftedStep:
    """What was generated, what had been drafted for each row, and seconds: to prepare, to draft and to verify that."""

    generated: Sequence[GeneratedToken]
    drafts: Sequence[Sequence[int]]
    prepare_s: float
    draft_s: float
    target_s: float


class PayingLengths:
    """Drafts as many tokens as bring the most tokens per second, and none in batches that gain nothing."""

    def __init__(self, expected: Expected) -> None:
        self._draft_share = expected.step_share
        self._acceptance = Acceptance(expected.chance)
        self._target = StepTimes(0.1)
        self._payoff = Payoff()
        self._is_drafting = False

    def choose(self, rows: Rows) -> Sequence[int]:
        self._is_drafting = self._payoff.drafts_next(_rounded(len(rows)))
        return self._best(rows).tolist() if self._is_drafting else [0] * len(rows)

    def learn(self, step: DraftedStep) -> None:
        num_drafted = sum(map(len, step.drafts))
        self._target.learn(len(step.drafts) + num_drafted, step.target_s)
        if num_drafted:
            self._target.pass_step()
            if self._draft_share:
                levels = max(map(len, step.drafts))
                share = step.draft_s / levels / float(self._target.of(np.array([num_drafted / levels]))[0])
                self._draft_share += _FOLLOWED * (min(share, _SLOW) - self._draft_share)
        seconds = step.draft_s + step.target_s
        self._payoff.learn(len(step.generated), step.prepare_s, seconds, is_drafting=self._is_drafting)
        counts: dict[int, int] = {}
        for token in step.generated:
            counts[token.sample_id] = counts.get(token.sample_id, 0) + 1
        for token in step.generated:
            if token.drafted_tokens:
                self._acceptance.learn(token.sample_id, token.drafted_tokens, counts[token.sample_id] - 1)
            if token.finished:
                self._acceptance.forget(token.sample_id)

    def _best(self, rows: Rows) -> Counts:
        chances = np.array([self._acceptance.of(row.request.sample_id) for row in rows])
        most = np.array([min(row.num_left - 1, _MOST) for row in rows])
        return best_lengths(chances, most, self._target.of, self._draft_s)

    def _draft_s(self, num_tokens: Floats) -> Floats:
        return self._draft_share * self._target.of(num_tokens)


def best_lengths(
    chances: Floats, most: Counts, target_s: Callable[[Floats], Floats], draft_s: Callable[[Floats], Floats]
) -> Counts:
    """Tokens to draft for each sample, so that a step brings the most tokens per second of all that draft any.

    chances: of each sample's next draft to be right, below 1, [samples]. most: drafts that a sample has room for.
    target_s: seconds of a forward over so many tokens. draft_s: of a draft's step over so many samples.
    """
    num_samples, levels = len(chances), int(most.max())
    counts = np.zeros(num_samples, dtype=np.int64)
    if not levels:
        return counts
    level = np.arange(levels)
    gains = chances[:, None] ** (level + 1)
    sample, depth = np.nonzero(level < most[:, None])
    order = np.argsort(-gains[sample, depth], kind="stable")  # a sample's own come in order: each gains less
    sample, depth = sample[order], depth[order]
    gained = gains[sample, depth]
    added_s = np.zeros(len(order))
    for one in level:
        at = depth == one
        added_s[at] = np.diff(draft_s(1.0 + np.arange(at.sum(), dtype=np.float64)), prepend=0.0)
    forward_s = target_s(num_samples + 1.0 + np.arange(len(order), dtype=np.float64))
    best_rate = 0.0
    for one in level:  # the deepest; its step costs something however few samples it is for
        allowed = depth <= one
        seconds = forward_s[: allowed.sum()] + np.cumsum(added_s[allowed])
        rates = (num_samples + np.cumsum(gained[allowed])) / seconds
        best = int(rates.argmax())
        if rates[best] > best_rate:
            best_rate = float(rates[best])
            counts = np.bincount(sample[allowed][: best + 1], minlength=num_samples)
    return counts
