"""What decode steps cost and what drafts bring, learnt from the spans of engines: with drafts or without.

A step of B samples with C tokens of context and D drafted tokens, in L steps of the draft, takes

    step_s + sample_s * (B + D) + context_s * C             of the model, which computes every drafted token, too, and
    c * (L * step_s + D * sample_s) + context_s * D * R      of the draft, which reads R keys of each: all, some or none

as `speculation.py` has it with the same number of drafts for each sample. Engines tell the draft's part from the
model's, so that each is fitted by itself: batches of all sizes say what the model takes, and what drafts take of that
is the median over steps, for the first after new weights prepares for all. A token's chance a of being drafted right is
the part of those that were, of those that were tried, with a prior until enough are known. Those of drafts that read a
window of keys, which engines tell, are counted apart: what of a they have is the share that a window leaves.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import fit_affine
from fuse.interstage.fading import Fading
from fuse.interstage.speculation import DRAFTS, Speculation

_KEPT = 512
"""Latest steps of each kind that are fitted; those of batches up to twice as large are a kind of their own."""
_KEPT_OF_ONE = 128
"""Of these, steps of one worker in one iteration."""
_PRIOR, _PRIOR_TOKENS = 0.8, 16.0
"""Drafted tokens that are right before any was seen, and how many seen ones that is worth; as engines have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """A span's sizes, as of `step_sizes`, and seconds: of the model, and of drafting."""

    batch: float
    context_tokens: float
    prefill_tokens: float
    drafted_tokens: float
    draft_steps: float
    drafted_in_window: float  # or not: 1 or 0
    seconds: float
    draft_s: float

    @staticmethod
    def of(sizes: Mapping[str, object], seconds: float) -> DecodeStep:
        """Traces of earlier versions tell nothing of drafts."""
        draft_s = _number(sizes.get("draft_s", 0))
        return DecodeStep(
            **{name: _number(sizes[name]) for name in ("batch", "context_tokens", "prefill_tokens")},
            **{name: _number(sizes.get(name, 0)) for name in ("drafted_tokens", "draft_steps", "drafted_in_window")},
            seconds=seconds - draft_s,
            draft_s=draft_s,
        )

    @property
    def computed_tokens(self) -> float:
        """By the model."""
        return self.batch + self.drafted_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCosts:
    """As in `CostModel`; `speculation` is None while nothing has been drafted."""

    step_s: float
    sample_s: float
    context_s: float
    speculation: Speculation | None

    def model_s(self, step: DecodeStep) -> float:
        """Of the model in such a step, without prefill."""
        return self.step_s + self.sample_s * step.computed_tokens + self.context_s * step.context_tokens


class DecodeCalibration:
    """Collects decode steps over iterations; `costs` is fitted to them."""

    def __init__(self) -> None:
        self._steps: defaultdict[int, Fading[DecodeStep]] = defaultdict(lambda: Fading(_KEPT))
        self._drafted: deque[DecodeStep] = deque(maxlen=_KEPT)
        self._tried = {in_window: deque[tuple[float, float]](maxlen=_KEPT) for in_window in (False, True)}

    def add(self, spans: Sequence[tuple[Mapping[str, object], float]], iteration: int = 0) -> list[DecodeStep]:
        """Learn from sizes and seconds of one worker in an iteration; returns the steps that also computed prompts."""
        steps = [DecodeStep.of(sizes, seconds) for sizes, seconds in spans if sizes["batch"]]
        by_size: defaultdict[int, list[DecodeStep]] = defaultdict(list)
        for step in steps:
            if not step.prefill_tokens:
                by_size[int(step.batch).bit_length()].append(step)
        for size, own in by_size.items():
            self._steps[size].add(iteration, _some(own))
        self._drafted.extend(_some([step for step in steps if step.drafted_tokens]))
        for in_window, counts in self._tried.items():
            tried = [
                sizes
                for sizes, _ in spans
                if sizes.get("tried_tokens") and bool(sizes.get("drafted_in_window")) == in_window
            ]
            if tried:
                right = sum(_number(one["tokens"]) - _number(one["batch"]) for one in tried)
                counts.append((right, sum(_number(one["tried_tokens"]) for one in tried)))
        return [step for step in steps if step.prefill_tokens]

    def costs(self, iteration: int = 0) -> DecodeCosts | None:
        """The costs in this iteration, or None before steps of enough sizes are known."""
        rows = [
            (step.computed_tokens, step.context_tokens, step.seconds)
            for step in chain.from_iterable(self._steps.values())
        ]
        if len({row[:2] for row in rows}) < 3:
            return None
        weights = np.concatenate([steps.weights(iteration) for steps in self._steps.values()])
        step_s, sample_s, context_s = fit_affine("decode", rows, weights)
        return DecodeCosts(
            step_s=step_s,
            sample_s=sample_s,
            context_s=context_s,
            speculation=self._speculation(step_s, sample_s, context_s),
        )

    def _speculation(self, step_s: float, sample_s: float, context_s: float) -> Speculation | None:
        if not self._drafted or not any(self._tried.values()):
            return None
        base_s = np.array([one.draft_steps * step_s + one.drafted_tokens * sample_s for one in self._drafted])
        drafted = np.array([one.drafted_tokens for one in self._drafted])
        context = np.array([one.context_tokens / one.batch for one in self._drafted])
        draft_s = np.array([one.draft_s for one in self._drafted])
        in_window = np.array([bool(one.drafted_in_window) for one in self._drafted])
        acceptance, window_share = self._chances()

        def share(reading_s: NDArray[np.float64]) -> float:
            return float(np.clip(np.median((draft_s - reading_s) / np.maximum(base_s, 1e-12)), 0.0, 1.0))

        def error(reading_s: NDArray[np.float64]) -> float:
            return float(np.median(np.abs(draft_s - share(reading_s) * base_s - reading_s)))

        read = np.where(in_window, np.minimum(context, DRAFTS["int8"].window_tokens), context)
        nothing_s, reading_s = 0 * context, context_s * drafted * read
        known = DRAFTS["ngram" if not in_window.any() and error(nothing_s) <= error(reading_s) else "int8"]
        return replace(
            known,
            acceptance=acceptance,
            window_share=window_share if known.window_tokens else 1.0,
            draft_share=share(reading_s if known.reads_context else nothing_s),
        )

    def _chances(self) -> tuple[float, float]:
        """Of a token to be drafted right, and what share of that is left with a window.

        Where only the one was tried, it tells of the other by the share that is known of such drafts.
        """
        share = DRAFTS["int8"].window_share
        right, tried = self._counted(in_window=False)
        right_in_window, tried_in_window = self._counted(in_window=True)
        if not tried:
            right, tried = right_in_window / share, tried_in_window
        acceptance = min(1.0, (_PRIOR * _PRIOR_TOKENS + right) / (_PRIOR_TOKENS + tried))
        expected = acceptance * share
        in_window = (expected * _PRIOR_TOKENS + right_in_window) / (_PRIOR_TOKENS + tried_in_window)
        return acceptance, min(1.0, in_window / acceptance)

    def _counted(self, *, in_window: bool) -> tuple[float, float]:
        """Tokens that were drafted right, and that were tried."""
        counts = self._tried[in_window]
        return sum(right for right, _ in counts), sum(tried for _, tried in counts)


def _some(steps: Sequence[DecodeStep]) -> Sequence[DecodeStep]:
    """Of all in turn."""
    return steps[:: max(1, math.ceil(len(steps) / _KEPT_OF_ONE))]


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)
