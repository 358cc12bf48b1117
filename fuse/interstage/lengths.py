"""How much longer will a sample run? A survival curve learnt from past iterations, and what others of its prompt tell.

A response of at most `limit` tokens that is longer than t has survived t: S(t) = P(length > t), S(limit) = 0. What is
left of one that has come to age a follows from S alone: P(length > t | length > a) = S(t) / S(a).

Other responses to a prompt tell of those to come if they have a factor in common, and nothing if not: `siblings` learns
which. Those of a running rollout tell it, ended or not, and those of earlier epochs. A curve of each prompt's own past
in place of that would follow a few lengths that mean nothing, where they have nothing in common, and is no better where
they have (`fuse bench tail --correlations`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.migration import EndedSamples, LiveSamples
from fuse.interstage.siblings import learn_variance, pooled_level, survival_given, weigh

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MAX_POINTS = 1024
"""Points of a curve: it is exact up to this many tokens, and interpolated between points beyond."""
_ROUNDING = 1e-12
"""Probabilities are told apart no better than this."""
_MEAN_POINTS = 24
"""Points at most between which a mean given siblings is integrated."""


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
        """Tokens still to come, at least 1, not exceeded with probability `level`, [..., n] or one; [..., n]."""
        ...

    def chance(self, ids: Ints, ages: Ints, tokens: Floats) -> Floats:
        """Probability of more than so many tokens [n] to come, [n]."""
        ...

    def given(self, live: LiveSamples, ended: EndedSamples) -> RemainingLengths:
        """The same, knowing how a rollout stands; it is asked about its live samples alone, at their ages."""
        ...

    def untold(self) -> RemainingLengths:
        """The same, knowing nothing of other responses to the samples' prompts."""
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
    """The pooled curve on the points `grid` [points] of 0..limit, and what has been seen of prompts.

    past: of each prompt, how many responses have ended, and the sum over all of G(tokens) - 1. variance: of the factor
    that siblings have in common, 0 if they have none.
    """

    limit: int
    grid: Floats
    curve: Floats
    past: Mapping[Hashable, tuple[float, float]]
    num_observations: int
    variance: float

    def for_samples(self, prompts: Mapping[int, Hashable] | None = None) -> SurvivalLengths:
        """The model for an iteration, given the prompts of its samples by sample id."""
        known = {sample: self.past[prompt] for sample, prompt in (prompts or {}).items() if prompt in self.past}
        past = np.zeros((2, max(known, default=-1) + 1))
        for sample, of_prompt in known.items():
            past[:, sample] = of_prompt
        point_of = np.searchsorted(self.grid, np.arange(self.limit), side="right") - 1
        with np.errstate(divide="ignore"):  # at the limit it is infinite
            growth = self.curve**-self.variance
        tails = _tails(self.grid, self.curve)
        return SurvivalLengths(self.limit, self.grid, point_of, self.curve, tails, self.variance, growth, past)


def learn(observations: Iterable[Observation], limit: int) -> LengthModel:
    """Learn the pooled curve, how much responses to a prompt have in common, and what each prompt's past says.

    Observations cut at or beyond `limit` count as ended there, for generation ends there too.

    Raises:
        ValueError: limit < 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}: a response may have at least one token")
    observed = list(observations)
    grid = np.unique(np.linspace(0, limit, min(limit + 1, _MAX_POINTS)).round())
    curve = _curve(observed, limit)
    of_prompts = [one for one in observed if one.prompt is not None]
    numbers: dict[Hashable, int] = {}
    groups = np.array([numbers.setdefault(one.prompt, len(numbers)) for one in of_prompts], dtype=np.int64)
    survival, ended = _at_ends(curve, of_prompts, limit)
    variance = learn_variance(survival, ended, groups)
    counts = np.bincount(groups, weights=ended, minlength=len(numbers)).tolist()
    exposures = np.bincount(groups, weights=survival**-variance - 1, minlength=len(numbers)).tolist()
    past = dict(zip(numbers, zip(counts, exposures, strict=True), strict=True))
    return LengthModel(limit, grid, curve[grid.astype(np.int64)], past, len(observed), variance)


def drift(model: LengthModel, recent: Sequence[Observation]) -> float:
    """How far recent lengths are from the model: the greatest difference of the curves over its critical value at 1%.

    Above 1 the distribution has moved, and what was tuned to it is worth tuning again. Source: the two-sample test
    of Kolmogorov and Smirnov; censored samples enter by way of the Kaplan-Meier curve, which makes it approximate.
    """
    if not recent or not model.num_observations:
        return float("inf") if recent else 0.0
    points = model.grid[model.grid < max(one.tokens for one in recent)].astype(np.int64)  # nothing is known beyond
    distance = float(np.max(np.abs(_curve(recent, model.limit)[points] - model.curve[: len(points)])))
    critical = 1.628 * np.sqrt(1 / len(recent) + 1 / model.num_observations)
    return distance / float(critical)


@dataclass(frozen=True, slots=True, eq=False)
class SurvivalLengths:
    """Remaining lengths by the pooled `curve` [points], with the area `tails` [points] beyond each.

    `point_of` [limit]: the last of the `grid` points [points] that is not after an age. `variance`: of the factor that
    siblings have in common, 0 if they have none; `growth` [points]: G of `siblings`. `past` [2, n]: by sample id, of
    earlier responses to its prompt, how many have ended and their exposure, the sum of G - 1; ids beyond have none.
    `told`: by siblings and the past, None while siblings have told nothing.
    """

    limit: int
    grid: Floats
    point_of: Ints
    curve: Floats
    tails: Floats
    variance: float
    growth: Floats
    past: Floats
    told: Told | None = None

    def given(self, live: LiveSamples, ended: EndedSamples) -> SurvivalLengths:
        """With what siblings have told by now: how many have ended, and what all of them have lived through."""
        if not self.variance or not len(live) or np.bincount(np.append(live.prompts, ended.prompts)).max() < 2:
            return self
        # A response ends within its last token: in the middle of the step that the curve takes there.
        ended_at = np.clip(ended.response_tokens - 0.5, 0, self.limit - 1)
        num_ended, exposures = weigh(
            live.prompts,
            self._growth(np.minimum(live.response_tokens, self.limit - 1)),
            ended.prompts,
            self._growth(ended_at),
            ended.response_tokens < self.limit,
        )
        past_ended, past_exposures = self._past(live.ids)
        place_of = np.zeros(live.ids.max() + 1, dtype=np.int64)
        place_of[live.ids] = np.arange(len(live))
        return replace(self, told=Told(place_of, num_ended + past_ended, exposures + past_exposures))

    def expected(self, ids: Ints, ages: Ints) -> Floats:
        """Mean of what is left: the area under the curve beyond the age, over its height there."""
        ages = np.minimum(ages, self.limit - 1)
        if (told := self._told(ids, ages)) is not None:
            # Between whole tokens the curve is a staircase, which has half a token more under it than its chords.
            return np.clip(self._area_given(told, ages) + 0.5, 1.0, self.limit - ages)
        index, weight = self._locate(ages)
        survival = self._at(index, weight)
        # The area beyond the age: that beyond the next point, and the trapezoid up to it.
        width = self.grid[index + 1] - ages
        area = self.tails[index + 1] + width * (survival + self.curve[index + 1]) / 2
        return np.clip(area / survival + 0.5, 1.0, self.limit - ages)

    def quantile(self, ids: Ints, ages: Ints, level: Floats | float) -> Floats:
        """Where the curve beyond the age has fallen to 1 - level of its height there, or as far as siblings have it."""
        ages = np.minimum(ages, self.limit - 1)
        if (told := self._told(ids, ages)) is not None:
            target = pooled_level(level, self._growth(ages), self.variance, *told)
        else:
            target = self._at(*self._locate(ages)) * (1 - level)
        reached = np.searchsorted(-self.curve, -target - _ROUNDING, side="left")
        return np.clip(self.grid[reached] - ages, 1.0, self.limit - ages)

    def chance(self, ids: Ints, ages: Ints, tokens: Floats) -> Floats:
        """The curve so far beyond the age, over its height there, or as siblings have it."""
        ages = np.minimum(ages, self.limit - 1)
        then = np.minimum(ages + tokens, self.limit - 1)
        if (told := self._told(ids, ages)) is not None:
            gain = self._growth(then) - self._growth(ages)
            return survival_given(gain[:, None], self.variance, *told)[:, 0]
        return self._at(*self._locate(then)) / self._at(*self._locate(ages))

    def untold(self) -> SurvivalLengths:
        """The pooled curve alone."""
        return replace(self, past=np.zeros((2, 0)), told=None)

    def _told(self, ids: Ints, ages: Ints) -> tuple[Floats, Floats] | None:
        """How many have ended of each sample's siblings and its prompt's past, and the exposure; None for nothing."""
        if self.told is not None:
            return self.told.of(ids)
        if not self.variance or not self.past.any():
            return None
        past_ended, past_exposures = self._past(ids)
        return past_ended, self._growth(ages) + past_exposures

    def _past(self, ids: Ints) -> Floats:
        """Columns of `past`, [2, ids]."""
        found = np.zeros((2, len(ids)))
        known = ids < self.past.shape[1]
        found[:, known] = self.past[:, ids[known]]
        return found

    def _area_given(self, told: tuple[Floats, Floats], ages: Ints) -> Floats:
        """Area beyond the age under P(length > t | all that is known), by trapezoids that widen with the distance."""
        last = len(self.grid) - 1
        steps = np.append(0, np.unique(np.geomspace(1, last, min(last, _MEAN_POINTS)).astype(np.int64)))
        at = np.minimum(self._locate(ages)[0][:, None] + 1 + steps, last)
        gains = self.growth[at] - self._growth(ages)[:, None]
        survival = survival_given(gains, self.variance, *told)
        points = self.grid[at]
        first = (points[:, 0] - ages) * (1 + survival[:, 0]) / 2
        area: Floats = first + (np.diff(points, axis=1) * (survival[:, :-1] + survival[:, 1:]) / 2).sum(axis=1)
        return area

    def _growth(self, ages: Ints | Floats) -> Floats:
        """G(age) = S(age) ** -v, [n]."""
        growth: Floats = self._at(*self._locate(ages)) ** -self.variance
        return growth

    def _locate(self, ages: Ints | Floats) -> tuple[Ints, Floats]:
        """The grid point at or before each age, and how far the age is towards the next."""
        index = self.point_of[ages.astype(np.int64)]
        return index, (ages - self.grid[index]) / (self.grid[index + 1] - self.grid[index])

    def _at(self, index: Ints, weight: Floats) -> Floats:
        values = self.curve[index] * (1 - weight) + self.curve[index + 1] * weight
        survival: Floats = np.maximum(values, _ROUNDING)
        return survival


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What siblings have told of live samples, as of `siblings.weigh`, [live] each; `place_of` [n] finds them by id."""

    place_of: Ints
    num_ended: Floats
    exposures: Floats

    def of(self, ids: Ints) -> tuple[Floats, Floats]:
        """Of these samples."""
        places = self.place_of[ids]
        return self.num_ended[places], self.exposures[places]


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
        shape = np.broadcast_shapes(np.shape(level), ids.shape)
        return np.broadcast_to(self.expected(ids, ages), shape)

    def chance(self, ids: Ints, ages: Ints, tokens: Floats) -> Floats:
        """There is no doubt."""
        return (self.expected(ids, ages) > tokens).astype(np.float64)

    def untold(self) -> KnownLengths:
        """It has been told of no other responses."""
        return self

    def given(self, live: LiveSamples, ended: EndedSamples) -> KnownLengths:
        """Nothing is to be told."""
        return self


def _ends(observation: Observation, limit: int) -> bool:
    """Whether a response was seen to end by itself."""
    return not observation.censored and observation.tokens < limit


def _at_ends(curve: Floats, observed: Sequence[Observation], limit: int) -> tuple[Floats, NDArray[np.bool_]]:
    """The pooled S(0), ..., S(limit) at each response's length, and whether it ended there."""
    tokens = np.array([min(one.tokens, limit - 1) for one in observed], dtype=np.int64)
    ended = np.array([_ends(one, limit) for one in observed], dtype=np.bool_)
    before = np.maximum(tokens - ended, 0)  # a response ends within its last token
    return np.maximum((curve[tokens] + curve[before]) / 2, _ROUNDING), ended


def _curve(observations: Sequence[Observation], limit: int) -> Floats:
    tokens = np.array([observation.tokens for observation in observations], dtype=np.int64)
    censored = np.array([one.censored and one.tokens < limit for one in observations], dtype=np.bool_)
    return kaplan_meier(tokens, censored, limit)


def _tails(grid: Floats, curve: Floats) -> Floats:
    """Area under the curve beyond each point, [points]."""
    pieces = np.diff(grid) * (curve[:-1] + curve[1:]) / 2
    return np.append(np.cumsum(pieces[::-1])[::-1], 0.0)
