"""How well siblings and earlier epochs tell lengths, and what rollouts gain by it, on recorded lengths.

Few traces say which responses are to one prompt. So rows are dealt into groups whose lengths correlate as asked for, by
a Gaussian copula: each group draws z ~ N(0, 1) and each of its samples sqrt(r) z + sqrt(1 - r) e, e ~ N(0, 1); in the
order of these numbers samples get the trace's lengths, each of which is dealt once. The prompt is that of a group's
first row. What groups are like is the copula's, and not the gamma frailty that `siblings.py` assumes.

A prompt has two epochs of samples. Lengths are learnt from the first epoch of other prompts (siblings), or also from
that of the prompts themselves (history), and held against the second epoch. Loss: the quantile loss at four levels of
the logarithm of live samples' lengths, at ages at which a quarter, half and three quarters of all have ended, over that
without either; off: the greatest difference of a level and the part of samples below its quantile, apart for groups of
which half has ended and others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import CostModel
from fuse.interstage.dealing import prompt_numbers
from fuse.interstage.length_trace import LengthTrace
from fuse.interstage.lengths import Observation, SurvivalLengths, learn
from fuse.interstage.migration import EndedSamples, EngineLimits, LiveSamples
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate

Ints = NDArray[np.int64]

_LEVELS = (0.25, 0.5, 0.75, 0.9)
_AGES = (0.25, 0.5, 0.75)
_FEWEST = 100
"""Live samples of a class, below which it says nothing of a level."""


def in_groups(trace: LengthTrace, size: int, correlation: float, seed: int = 0) -> LengthTrace:
    """The same lengths, dealt into groups of `size` rows in turn, so correlated; what fills no group is left out."""
    random = np.random.default_rng(seed)
    num_groups = len(trace) // size
    common = np.repeat(random.normal(size=num_groups), size)
    drawn = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * random.normal(size=num_groups * size)
    rows = random.permutation(len(trace))[: num_groups * size]
    rows = rows[np.argsort(trace.response_tokens[rows], kind="stable")]
    dealt = np.empty_like(rows)
    dealt[np.argsort(drawn)] = rows
    return LengthTrace(
        np.repeat(trace.prompt_tokens[dealt][::size], size),
        trace.response_tokens[dealt],
        tuple(np.repeat(np.arange(num_groups), size).tolist()),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """A rollout's lengths, all of one epoch, by what is known beforehand: nothing of prompts, siblings, and history."""

    lengths: Ints
    prompts: Ints
    prompt_tokens: Ints
    pooled: SurvivalLengths
    siblings: SurvivalLengths
    history: SurvivalLengths

    @property
    def by_name(self) -> dict[str, SurvivalLengths]:
        return {"pooled": self.pooled, "siblings": self.siblings, "history": self.history}


def told(trace: LengthTrace, size: int, held_out: slice, limit: int) -> Told:
    """Of the second half of each group among the groups `held_out`. trace: in groups of 2 `size` rows."""
    responses = trace.response_tokens.reshape(-1, 2 * size)
    first, second = responses[:, :size], responses[held_out, size:]
    groups = np.arange(len(responses))
    others = np.delete(groups, held_out)

    def observed(chosen: Ints) -> list[Observation]:
        return [Observation(tokens, prompt=group) for group in chosen.tolist() for tokens in first[group].tolist()]

    prompts = np.repeat(groups[held_out], size)
    siblings = learn(observed(others), limit)
    history = learn(observed(groups), limit)
    plain = siblings.for_samples()
    return Told(
        lengths=second.reshape(-1),
        prompts=prompts,
        prompt_tokens=trace.prompt_tokens.reshape(responses.shape)[held_out, size:].reshape(-1),
        pooled=replace(plain, variance=0.0),
        siblings=plain,
        history=history.for_samples(dict(enumerate(prompts.tolist()))),
    )


def held_against(case: Told, size: int) -> dict[str, dict[str, float]]:
    """By name of what is known: `loss` and `off`."""
    found = {name: _score(case, lengths, size) for name, lengths in case.by_name.items()}
    pooled_loss = found["pooled"][0] or 1.0  # where all lengths are known exactly
    return {name: {"loss": loss / pooled_loss, "off": off} for name, (loss, off) in found.items()}


def _score(case: Told, known: SurvivalLengths, size: int) -> tuple[float, float]:
    losses = []
    below: dict[tuple[float, bool], list[NDArray[np.bool_]]] = {}
    for age in np.quantile(case.lengths, _AGES).astype(np.int64):
        live = np.flatnonzero(case.lengths > age)
        if not len(live):
            continue
        ended = case.lengths <= age
        _, group = np.unique(case.prompts, return_inverse=True)
        is_short = (np.bincount(group, weights=ended) >= size / 2)[group[live]]
        ages, left = np.full(len(live), age), case.lengths[live] - age
        given = known.given(_live(live, ages, group[live]), EndedSamples(group[ended], case.lengths[ended]))
        for level in _LEVELS:
            quantile = given.quantile(live, ages, level)
            beyond = np.log((age + left) / (age + quantile))
            losses.append(float(np.mean(np.maximum(level * beyond, (level - 1) * beyond))))
            for short in (True, False):
                below.setdefault((level, short), []).append((left <= quantile)[is_short == short])
    shares = {key: np.concatenate(those) for key, those in below.items()}
    known_well = [(level, one) for (level, _), one in shares.items() if len(one) >= _FEWEST]
    off = max((abs(float(one.mean()) - level) for level, one in known_well), default=0.0)
    return sum(losses), off


def _live(ids: Ints, ages: Ints, prompts: Ints) -> LiveSamples:
    zeros, flags = np.zeros(len(ids), dtype=np.int64), np.ones(len(ids), dtype=np.bool_)
    return LiveSamples(ids, zeros, zeros + 1, ages, flags, flags, prompts)


def rollout_seconds(case: Told, costs: CostModel, limits: EngineLimits, num_devices: int) -> dict[str, float]:
    """Of the case's samples under `adaptive`, by what is known."""
    rollout = Rollout(
        prompt_tokens=case.prompt_tokens,
        response_tokens=case.lengths,
        num_devices=num_devices,
        costs=costs,
        limits=limits,
        prompts=prompt_numbers(case.prompts.tolist()),
    )
    return {name: simulate(rollout, Adaptive(costs, lengths)).makespan_s for name, lengths in case.by_name.items()}
