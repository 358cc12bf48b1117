"""How much longer will a sample run? Survival curves learnt from past iterations, pooled and per prompt.

A response of at most `limit` tokens that is longer than t has survived t: S(t) = P(length > t), S(limit) = 0. What is
left of one that has come to age a follows from S alone: P(length > t | length > a) = S(t) / S(a).

Past responses of a prompt give it a curve of its own. Those of a running rollout, ended or not, tell of live siblings
if lengths of siblings have a factor in common, and nothing of older ones if not: `siblings` learns which.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
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
_POOLED_SAMPLES = 4.0
"""Samples of the pooled curve that a prompt's own curve counts beside its own."""
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

    def given(self, live: LiveSamples, ended: EndedSamples) -> RemainingLengths:
        """The same, knowing how a rollout stands; it is asked about its live samples alone, at their ages."""
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
    """Curves on the common points `grid` [points] of 0..limit: one pooled, and one per prompt that has been seen.

    num_ended: past responses of each of those prompts that were seen to end. variance: of the factor that siblings have
    in common, 0 if they have none.
    """

    limit: int
    grid: Floats
    pooled: Floats
    by_prompt: Mapping[Hashable, Floats]
    num_ended: Mapping[Hashable, int]
    num_observations: int
    variance: float

    def for_samples(self, prompts: Mapping[int, Hashable] | None = None) -> SurvivalLengths:
        """The model for an iteration, given the prompts of its samples by sample id."""
        known = {sample: prompt for sample, prompt in (prompts or {}).items() if prompt in self.by_prompt}
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(known.values()), 1)}
        curves = np.stack([self.pooled, *(self.by_prompt[prompt] for prompt in rows)])
        row_of = np.zeros(max(known, default=-1) + 1, dtype=np.int64)
        for sample, prompt in known.items():
            row_of[sample] = rows[prompt]
        point_of = np.searchsorted(self.grid, np.arange(self.limit), side="right") - 1
        # The past of a prompt has told of its factor: Gamma(1 / v + d, ...) has this variance for a mean of 1.
        past = np.array([0, *(self.num_ended[prompt] for prompt in rows)], dtype=np.float64)
        variances = self.variance / (1 + self.variance * past)
        with np.errstate(divide="ignore"):  # at the limit it is infinite
            growths = curves ** -variances[:, None]
        tails = _tails(self.grid, curves)
        return SurvivalLengths(self.limit, self.grid, point_of, curves, tails, row_of, variances, growths)


def learn(observations: Iterable[Observation], limit: int, own: Collection[Hashable] | None = None) -> LengthModel:
    """Learn the pooled curve, and each seen prompt's, which counts some pooled samples beside its own.

    Observations cut at or beyond `limit` count as ended there, for generation ends there too. own: prompts that get a
    curve; by default all. How much siblings have in common is learnt of all.

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
    curve = _curve(observed, limit)
    pooled = curve[points]
    by_prompt, num_ended = {}, {}
    for prompt in groups if own is None else groups.keys() & set(own):
        group = groups[prompt]
        num_ended[prompt] = sum(_ends(one, limit) for one in group)
        weight = len(group) / (len(group) + _POOLED_SAMPLES)
        by_prompt[prompt] = weight * _curve(group, limit, prior=0.0)[points] + (1 - weight) * pooled
    variance = _variance(curve, list(groups.values()), limit)
    return LengthModel(limit, grid, pooled, by_prompt, num_ended, len(observed), variance)


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

    `point_of` [limit]: the last of the `grid` points [points] that is not after an age. `variances` [rows]: of the
    factor that siblings have in common, all 0 if they have none; `growths` [rows, points]: G of `siblings`. `told`: by
    siblings, None while nothing is.
    """

    limit: int
    grid: Floats
    point_of: Ints
    curves: Floats
    tails: Floats
    row_of: Ints
    variances: Floats
    growths: Floats
    told: Told | None = None

    def given(self, live: LiveSamples, ended: EndedSamples) -> SurvivalLengths:
        """With what siblings have told by now: how many have ended, and what all of them have lived through."""
        if not self.variances[0] or not len(live) or np.bincount(np.append(live.prompts, ended.prompts)).max() < 2:
            return self
        rows = self._rows(live.ids)
        row_of_prompt = np.zeros(1 + max(live.prompts.max(), ended.prompts.max(initial=0)), dtype=np.int64)
        row_of_prompt[live.prompts] = rows
        # A response ends within its last token: in the middle of the step that the curve takes there.
        ended_at = np.clip(ended.response_tokens - 0.5, 0, self.limit - 1)
        num_ended, exposures = weigh(
            live.prompts,
            self._growth(rows, np.minimum(live.response_tokens, self.limit - 1)),
            ended.prompts,
            self._growth(row_of_prompt[ended.prompts], ended_at),
            ended.response_tokens < self.limit,
        )
        place_of = np.zeros(live.ids.max() + 1, dtype=np.int64)
        place_of[live.ids] = np.arange(len(live))
        return replace(self, told=Told(place_of, num_ended, exposures))

    def expected(self, ids: Ints, ages: Ints) -> Floats:
        """Mean of what is left: the area under the curve beyond the age, over its height there."""
        rows, ages = self._rows(ids), np.minimum(ages, self.limit - 1)
        if self.told is not None:
            # Between whole tokens the curve is a staircase, which has half a token more under it than its chords.
            return np.clip(self._area_given(self.told, ids, rows, ages) + 0.5, 1.0, self.limit - ages)
        index, weight = self._locate(ages)
        survival = self._at(self.curves, rows, index, weight)
        # The area beyond the age: that beyond the next point, and the trapezoid up to it.
        width = self.grid[index + 1] - ages
        next_survival = self.curves[rows, index + 1]
        area = self.tails[rows, index + 1] + width * (survival + next_survival) / 2
        return np.clip(area / survival + 0.5, 1.0, self.limit - ages)

    def quantile(self, ids: Ints, ages: Ints, level: Floats | float) -> Floats:
        """Where the curve beyond the age has fallen to 1 - level of its height there, or as far as siblings have it."""
        rows, ages = self._rows(ids), np.minimum(ages, self.limit - 1)
        index, weight = self._locate(ages)
        survival = self._at(self.curves, rows, index, weight)
        if self.told is None:
            target = survival * (1 - level) + _ROUNDING
        else:
            variances = self.variances[rows]
            target = pooled_level(level, survival**-variances, variances, *self.told.of(ids)) + _ROUNDING
        pooled = rows == 0
        if pooled.all():
            reached = np.searchsorted(-self.curves[0], -target, side="left")
        else:
            reached = np.empty(target.shape, dtype=np.int64)
            reached[..., pooled] = np.searchsorted(-self.curves[0], -target[..., pooled], side="left")
            below = self.curves[rows[~pooled]] <= target[..., ~pooled, None]
            reached[..., ~pooled] = np.argmax(below, axis=-1)
        return np.clip(self.grid[reached] - ages, 1.0, self.limit - ages)

    def _area_given(self, told: Told, ids: Ints, rows: Ints, ages: Ints) -> Floats:
        """Area beyond the age under P(length > t | all that is known), by trapezoids that widen with the distance."""
        last = len(self.grid) - 1
        steps = np.append(0, np.unique(np.geomspace(1, last, min(last, _MEAN_POINTS)).astype(np.int64)))
        at = np.minimum(self._locate(ages)[0][:, None] + 1 + steps, last)
        gains = self.growths[rows[:, None], at] - self._growth(rows, ages)[:, None]
        survival = survival_given(gains, self.variances[rows], *told.of(ids))
        points = self.grid[at]
        first = (points[:, 0] - ages) * (1 + survival[:, 0]) / 2
        area: Floats = first + (np.diff(points, axis=1) * (survival[:, :-1] + survival[:, 1:]) / 2).sum(axis=1)
        return area

    def _growth(self, rows: Ints, ages: Ints | Floats) -> Floats:
        """G(age) = S(age) ** -v of samples with these rows, [n]."""
        growth: Floats = self._at(self.curves, rows, *self._locate(ages)) ** -self.variances[rows]
        return growth

    def _rows(self, ids: Ints) -> Ints:
        if len(self.curves) == 1:
            return np.zeros(len(ids), dtype=np.int64)
        known = ids < len(self.row_of)
        rows = np.zeros(len(ids), dtype=np.int64)
        rows[known] = self.row_of[ids[known]]
        return rows

    def _locate(self, ages: Ints | Floats) -> tuple[Ints, Floats]:
        """The grid point at or before each age, and how far the age is towards the next."""
        index = self.point_of[ages.astype(np.int64)]
        return index, (ages - self.grid[index]) / (self.grid[index + 1] - self.grid[index])

    @staticmethod
    def _at(curves: Floats, rows: Ints, index: Ints, weight: Floats) -> Floats:
        values = curves[rows, index] * (1 - weight) + curves[rows, index + 1] * weight
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

    def given(self, live: LiveSamples, ended: EndedSamples) -> KnownLengths:
        """Nothing is to be told."""
        return self


def _ends(observation: Observation, limit: int) -> bool:
    """Whether a response was seen to end by itself."""
    return not observation.censored and observation.tokens < limit


def _variance(curve: Floats, groups: Sequence[Sequence[Observation]], limit: int) -> float:
    """Of the factor that siblings have in common, given the pooled S(0), ..., S(limit)."""
    observed = [one for group in groups for one in group]
    tokens = np.array([min(one.tokens, limit - 1) for one in observed], dtype=np.int64)
    ended = np.array([_ends(one, limit) for one in observed], dtype=np.bool_)
    before = np.maximum(tokens - ended, 0)  # a response ends within its last token
    survival = np.maximum((curve[tokens] + curve[before]) / 2, _ROUNDING)
    return learn_variance(survival, ended, np.repeat(np.arange(len(groups)), [len(group) for group in groups]))


def _curve(observations: Sequence[Observation], limit: int, prior: float = 0.5) -> Floats:
    tokens = np.array([observation.tokens for observation in observations], dtype=np.int64)
    censored = np.array([one.censored and one.tokens < limit for one in observations], dtype=np.bool_)
    return kaplan_meier(tokens, censored, limit, prior)


def _tails(grid: Floats, curves: Floats) -> Floats:
    """Area under each curve beyond each point, [rows, points]."""
    pieces = np.diff(grid) * (curves[:, :-1] + curves[:, 1:]) / 2
    areas = np.cumsum(pieces[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([areas, np.zeros((len(curves), 1))], axis=1)
