"""How a rollout would go on with so many engines: a fluid model, evaluated for many plans at once.

All samples advance in step, so those with more than s tokens left are live s steps later. They are a share l(s) of the
samples live now, and each sample is among them with the same probability. For an engine that has c samples now,

    step(s)  = step_s + (1 + (c - 1) * l(s)) * (sample_s + context_s * context(s))     while it has the last of all
    busy(s)  = 1 - (1 - l(s)) ** c                                                     the chance that it has any

where engines draft with as many drafts as are best, and devices that are not busy score what the others finish. A plan
keeps the engines that decode now, loaded as they are, until a certain number of samples is left; then it goes on with
another number of engines, loaded evenly.

Its makespan is the time to the last token, and then the time to score what is left: all devices share that, but one of
them scores the last sample alone. Or it is the end of the sample with the longest context, which takes the longest to
score, if that comes later.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel, fastest

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NUM_POINTS = 14
"""Counts of samples left, from all to one, at which a plan may change the number of engines."""
_LEAST_GAIN = 0.005
"""Part of the time to come that a change of the number of engines must save: estimates are no better than that."""
_PATIENCE = 0.97
"""A change is made now if it gains at least this part of what the best later one would, for the future is uncertain."""
_FEWER = 0.75
"""Ratio of the numbers of engines that are tried."""
_PIECE_TOKENS = 4096
"""Tokens assumed of a piece that is scored at once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outlook:
    """What may be ahead of a rollout.

    remaining: [draws, live], draws of the tokens that each live sample has left.
    live, context_tokens: [engines], of each engine that decodes, its samples and the tokens of their context.
    widest: index of the live sample with most context, and the tokens of that.
    backlog_tokens: of samples that are finished and not scored.
    max_batch: samples that an engine runs at once.
    """

    costs: CostModel
    remaining: Floats
    live: Ints
    context_tokens: Ints
    widest: tuple[int, int]
    backlog_tokens: float
    num_devices: int
    max_batch: int
    can_transfer: bool


def best_num_engines(outlook: Outlook, most: int) -> int:
    """How many engines, up to `most`, are to decode; not as many as now only if no later change would do better."""
    num_now = len(outlook.live)
    fewer = np.append(num_now * _FEWER ** np.arange(24), num_now - 1)
    more = np.linspace(num_now, max(num_now, most), 4)
    choices = np.unique(np.concatenate([fewer, more]).round().astype(np.int64).clip(1))
    if len(choices) == 1:
        return num_now
    stay = int(np.searchsorted(choices, num_now))
    now_s = makespans(outlook, choices, num_points=1)[:, 0]
    best = int(np.argmin(now_s))
    gain_s = float(now_s[stay] - now_s[best])
    if gain_s <= _LEAST_GAIN * now_s[stay]:
        return num_now
    later_s = makespans(outlook, choices[:stay])[:, 1:]
    later_gain_s = float(now_s[stay] - later_s.min(initial=np.inf))
    return int(choices[best]) if gain_s >= _PATIENCE * later_gain_s else num_now


def makespans(outlook: Outlook, choices: Ints, num_points: int | None = None) -> Floats:
    """Seconds from now of plans that go over to `choices` [choices] engines at some point, [choices, points].

    The points are counts of samples left; the first of them is now. Means over the draws. num_points: of the first so
    many points alone; by default of all.
    """
    costs, num_live = outlook.costs, outlook.remaining.shape[1]
    context_now = float(outlook.context_tokens.sum()) / num_live
    ascending = np.sort(outlook.remaining, axis=1)
    longest = ascending[:, -1:]
    left = _points(num_live)
    # [draws, points], and intervals from each point to the next alike.
    starts = np.where(left < num_live, ascending[:, num_live - 1 - left], 0.0)  # steps after which so many are left
    steps = np.diff(starts, append=longest)
    shorter = np.cumsum(np.pad(ascending, ((0, 0), (1, 0))), axis=1)  # steps of all but the longest so many
    taken = left * starts + shorter[:, num_live - left]
    live = np.diff(taken, append=shorter[:, -1:]) / np.maximum(steps, 1e-9)
    context = context_now + starts + steps / 2
    finished_tokens = -np.diff(left, append=0) * (context + steps / 2)

    # Engines as they are: the last sample is on one of them as likely as any other sample is.
    typical = costs.at(num_live / len(outlook.live), context_now * num_live / len(outlook.live))
    load = typical.sample_s * outlook.live + typical.context_s * outlook.context_tokens
    skew = float(outlook.live @ load) / max(float(load.sum()), 1e-12)
    seconds_now = steps * _step_s(outlook, skew, live / num_live, context)
    busy_now = (1 - (1 - np.minimum(live / num_live, 1.0))[..., None] ** outlook.live).sum(axis=-1)
    # Engines evenly loaded from a point on, [draws, choices, points, intervals].
    changes = left[:num_points]
    engines = np.minimum(choices[:, None, None], changes[:, None])
    share = np.minimum(_per_plan(live) / changes[:, None], 1.0)
    each = changes[:, None] / engines
    seconds_then = _per_plan(steps) * _step_s(outlook, each, share, _per_plan(context))
    busy_then = engines * (1 - (1 - share) ** each)

    points = np.arange(len(changes))
    changed = points[:, None] <= np.arange(len(left))
    seconds = np.where(changed, seconds_then, _per_plan(seconds_now))
    seconds[..., points, points] += _change_s(outlook, choices, changes, context_now + starts[:, : len(changes)])
    busy = np.where(changed, busy_then, _per_plan(busy_now))

    token_s = costs.inference_token_s + costs.inference_s / min(costs.inference_batch_tokens, _PIECE_TOKENS)
    # Before each interval, and at the end.
    arriving_s = np.insert(finished_tokens, 0, outlook.backlog_tokens, axis=1) * token_s
    surplus_s = _per_plan(arriving_s[:, :-1]) - (outlook.num_devices - busy) * seconds
    ahead_s = np.maximum(0.0, np.cumsum(surplus_s[..., ::-1], axis=-1).max(axis=-1))
    backlog_s = arriving_s[:, -1:, None] + ahead_s
    last_s = costs.inference_s + costs.inference_token_s * (context_now + longest[..., None])
    total_s = seconds.sum(axis=-1) + np.maximum(last_s, backlog_s / outlook.num_devices)

    widest, widest_context = outlook.widest
    widest_remaining = outlook.remaining[:, widest, None]
    passed = np.clip((widest_remaining - starts) / np.maximum(steps, 1e-9), 0.0, 1.0)
    scoring_s = costs.inference_s + costs.inference_token_s * (widest_context + widest_remaining)
    widest_s = (seconds * _per_plan(passed)).sum(axis=-1) + scoring_s[..., None]
    latest_s: Floats = np.maximum(total_s, widest_s).mean(axis=0)
    return latest_s


def _per_plan(values: Floats) -> Floats:
    """[draws, intervals] of every plan, to go with [draws, choices, points, intervals]."""
    return values[:, None, None, :]


@cache
def _points(num_live: int) -> Ints:
    return np.unique(np.geomspace(num_live, 1, _NUM_POINTS).round().astype(np.int64))[::-1]


def _step_s(outlook: Outlook, each: Floats | float, share: Floats, context: Floats) -> Floats:
    """Seconds per token of the last sample on an engine that had `each`; where batches are full, samples take turns."""
    batch = 1 + np.maximum(0.0, each - 1) * share
    turns = np.maximum(1.0, batch / outlook.max_batch)
    return fastest(outlook.costs, lambda one: turns * one.step_s + batch * (one.sample_s + one.context_s * context))


def _change_s(outlook: Outlook, choices: Ints, left: Ints, context: Floats) -> Floats:
    """Seconds that a change takes when so many samples are left, [draws, choices, points].

    context [draws, points]: tokens of each of them.

    What moves is computed again by engines that stand still meanwhile, or is copied while the others go on.
    """
    costs, num_now = outlook.costs, len(outlook.live)
    by_load = np.append(0, np.cumsum(np.sort(outlook.live)[::-1])) / outlook.live.sum()
    stays = np.where(choices <= num_now, by_load[np.minimum(choices, num_now)], num_now / choices)
    moved = (1 - stays)[:, None] * left
    per_target = np.maximum(moved / choices[:, None], 1.0)
    context = context[:, None, :]
    seconds = costs.prefill_s + costs.prefill_token_s * context * per_target
    if outlook.can_transfer:
        transfer_s = costs.transfer_s + costs.transfer_byte_s * costs.kv_bytes_per_token * context
        seconds = np.minimum(seconds, transfer_s * moved / left)
    return np.where(moved > 0, seconds, 0.0)
