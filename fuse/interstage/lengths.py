"""How much longer will a sample run? Survival curves learnt from past iterations, pooled and per prompt.

A response of at most `limit` tokens that is longer than t has survived t: S(t) = P(length > t), S(limit) = 0. What is
left of one that has come to age a follows from S alone: P(length > t | length > a) = S(t) / S(a).

A response that has ended changes nothing of that for a sibling that is older already. Samples of one prompt start
together, so what ends within a rollout is learnt when the rollout is over.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MAX_POINTS = 1024
"""Points of a curve: it is exact up to this many tokens, and interpolated between points beyond."""
_ROUNDING = 1e-12
"""Probabilities are told apart no better than this."""
_POOLED_SAMPLES = 4.0
"""Samples of the pooled curve that a prompt's own curve counts beside its own."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A response's tokens; `censored` if it was cut there and might have gone on. `prompt` is any key, or None."""

    tokens: int
    censored: bool = False
    prompt: Hashable = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"a response of {self.tokens} tokens was observed: it has at least one")


class RemainingLengths(Protocol):
    """What a policy asks about live samples, given their ids [n] and tokens generated so far [n]."""

    def expected(self, ids: Ints, ages: Ints) -> Floats:
        """Mean tokens still to come, [n]; at least 1."""
        ...

    def quantile(self, ids: Ints, ages: Ints, level: Floats | float) -> Floats:
        """Tokens still to come that are not exceeded with probability `level`, one or [n]; [n], at least 1."""
        ...


def kaplan_meier(tokens: Ints, censored: NDArray[np.bool_], limit: int, prior: float = 0.5) -> Floats:
    """S(0), ..., S(limit) from lengths of which some were only seen to reach their last token.

    tokens [n], censored [n] -> [limit + 1]. `prior` responses that run to the limit are added, so that no age has
    probability 0; without observations lengths are taken as uniform on 1..limit. Source: Kaplan and Meier 1958.
    """
    if not len(tokens):
        return 1 - np.arange(limit + 1) / limit
    clipped = np.minimum(tokens, limit)
    ended = np.bincount(clipped[~censored], minlength=limit + 1)[: limit + 1]
    left = np.bincount(clipped, minlength=limit + 1)[: limit + 1]
    at_risk = len(tokens) + prior - np.concatenate([[0], np.cumsum(left)[:-1]])
    survival: Floats = np.cumprod(1 - ended / np.maximum(at_risk, _ROUNDING))  # with nobody at risk, nobody ends
    survival[limit] = 0.0
    return survival


@dataclass(frozen=True, slots=True, eq=False)
class LengthModel:
    """Curves on the common points `grid` [points] of 0..limit: one pooled, and one per prompt that has been seen."""

    limit: int
    grid: Floats
    pooled: Floats
    by_prompt: Mapping[Hashable, Floats]
    num_observations: int

    def for_samples(self, prompts: Mapping[int, Hashable] | None = None) -> SurvivalLengths:
        """The model for an iteration, given the prompts of its samples by sample id."""
        known = {sample: prompt for sample, prompt in (prompts or {}).items() if prompt in self.by_prompt}
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(known.values()), 1)}
        curves = np.stack([self.pooled, *(self.by_prompt[prompt] for prompt in rows)])
        row_of = np.zeros(max(known, default=-1) + 1, dtype=np.int64)
        for sample, prompt in known.items():
            row_of[sample] = rows[prompt]
        point_of = np.searchsorted(self.grid, np.arange(self.limit), side="right") - 1
        return SurvivalLengths(self.limit, self.grid, point_of, curves, _tails(self.grid, curves), row_of)


def learn(observations: Iterable[Observation], limit: int) -> LengthModel:
    """Learn the pooled curve, and each seen prompt's, which counts some pooled samples beside its own.

    Observations cut at or beyond `limit` count as ended there, for generation ends there too.

    Raises:
        ValueError: limit < 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}: a response may have at least one token")
    observed = list(observations)
    groups: dict[Hashable, list[Observation]] = {}
    for observation in observed:
        if observation.prompt is not None:
            groups.setdefault(observation.prompt, []).append(observation)
    grid = np.unique(np.linspace(0, limit, min(limit + 1, _MAX_POINTS)).round())
    points = grid.astype(np.int64)
    pooled = _curve(observed, limit)[points]
    by_prompt = {}
    for prompt, group in groups.items():
        weight = len(group) / (len(group) + _POOLED_SAMPLES)
        by_prompt[prompt] = weight * _curve(group, limit, prior=0.0)[points] + (1 - weight) * pooled
    return LengthModel(limit, grid, pooled, by_prompt, len(observed))


def drift(model: LengthModel, recent: Sequence[Observation]) -> float:
    """How far recent lengths are from the model: the greatest difference of the curves over its critical value at 1%.

    Above 1 the distribution has moved, and what was tuned to it is worth tuning again. Source: the two-sample test
    of Kolmogorov and Smirnov; censored samples enter by way of the Kaplan-Meier curve, which makes it approximate.
    """
    if not recent or not model.num_observations:
        return float("inf") if recent else 0.0
    points = model.grid[model.grid < max(one.tokens for one in recent)].astype(np.int64)  # nothing is known beyond
    distance = float(np.max(np.abs(_curve(recent, model.limit)[points] - model.pooled[: len(points)])))
    critical = 1.628 * np.sqrt(1 / len(recent) + 1 / model.num_observations)
    return distance / float(critical)


@dataclass(frozen=True, slots=True, eq=False)
class SurvivalLengths:
    """Remaining lengths by curve: `curves` and `tails` [rows, points]; samples beyond `row_of` [n] have row 0.

    `point_of` [limit]: the last of the `grid` points [points] that is not after an age.
    """

    limit: int
    grid: Floats
    point_of: Ints
    curves: Floats
    tails: Floats
    row_of: Ints

    def expected(self, ids: Ints, ages: Ints) -> Floats:
        """Mean of what is left: the area under the curve beyond the age, over its height there."""
        rows, ages = self._rows(ids), np.minimum(ages, self.limit - 1)
        index, weight = self._locate(ages)
        survival = self._at(self.curves, rows, index, weight)
        # The area beyond the age: that beyond the next point, and the trapezoid up to it.
        width = self.grid[index + 1] - ages
        next_survival = self.curves[rows, index + 1]
        area = self.tails[rows, index + 1] + width * (survival + next_survival) / 2
        # Between whole tokens the curve is a staircase, which has half a token more under it than its chords.
        return np.clip(area / survival + 0.5, 1.0, self.limit - ages)

    def quantile(self, ids: Ints, ages: Ints, level: Floats | float) -> Floats:
        """Where the curve beyond the age has fallen to 1 - level of its height there."""
        rows, ages = self._rows(ids), np.minimum(ages, self.limit - 1)
        index, weight = self._locate(ages)
        target = self._at(self.curves, rows, index, weight) * (1 - level) + _ROUNDING
        reached = np.empty(len(ages), dtype=np.int64)
        pooled = rows == 0
        reached[pooled] = np.searchsorted(-self.curves[0], -target[pooled], side="left")
        if not pooled.all():
            reached[~pooled] = np.argmax(self.curves[rows[~pooled]] <= target[~pooled, None], axis=1)
        return np.clip(self.grid[reached] - ages, 1.0, self.limit - ages)

    def _rows(self, ids: Ints) -> Ints:
        if len(self.curves) == 1:
            return np.zeros(len(ids), dtype=np.int64)
        known = ids < len(self.row_of)
        rows = np.zeros(len(ids), dtype=np.int64)
        rows[known] = self.row_of[ids[known]]
        return rows

    def _locate(self, ages: Ints) -> tuple[Ints, Floats]:
        """The grid point at or before each age, and how far the age is towards the next."""
        index = self.point_of[ages]
        return index, (ages - self.grid[index]) / (self.grid[index + 1] - self.grid[index])

    @staticmethod
    def _at(curves: Floats, rows: Ints, index: Ints, weight: Floats) -> Floats:
        values = curves[rows, index] * (1 - weight) + curves[rows, index + 1] * weight
        survival: Floats = np.maximum(values, _ROUNDING)
        return survival


@dataclass(frozen=True, slots=True, eq=False)
class KnownLengths:
    """The oracle: `lengths` [samples] are the final lengths by sample id."""

    lengths: Ints

    def expected(self, ids: Ints, ages: Ints) -> Floats:
        """What is left, as it will be."""
        remaining: Floats = np.maximum(1.0, self.lengths[ids] - ages)
        return remaining

    def quantile(self, ids: Ints, ages: Ints, level: Floats | float) -> Floats:
        """What is left, at every level."""
        return self.expected(ids, ages)


def _curve(observations: Sequence[Observation], limit: int, prior: float = 0.5) -> Floats:
    tokens = np.array([observation.tokens for observation in observations], dtype=np.int64)
    censored = np.array([one.censored and one.tokens < limit for one in observations], dtype=np.bool_)
    return kaplan_meier(tokens, censored, limit, prior)


def _tails(grid: Floats, curves: Floats) -> Floats:
    """Area under each curve beyond each point, [rows, points]."""
    pieces = np.diff(grid) * (curves[:, :-1] + curves[:, 1:]) / 2
    areas = np.cumsum(pieces[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([areas, np.zeros((len(curves), 1))], axis=1)
