"""How a rollout would go on with so many engines: a fluid model, evaluated for many plans at once.

All samples advance in step, so those with more than s tokens left are live s steps later. One of them ends last; of the
others a share l(s) is live, and each is among them with the same probability. For an engine that has c samples now,

    step(s)  = step_s + (1 + (c - 1) * l(s)) * (sample_s + context_s * context(s))     if it has the last
    busy(s)  = 1 if it has the last, else 1 - (1 - l(s)) ** c                          the chance that it has any

where engines draft with as many drafts as are best, and devices that are not busy score what the others finish. A plan
keeps the engines that decode now, loaded as they are, until a certain number of samples is left. Then it goes on with
another number of engines, loaded evenly, and with ever fewer as samples finish.

How many these are follows from one weight w: at each count of samples left, as many as have the least

    step * (1 - w + w * busy engines / devices)

With w = 0 the last sample ends soonest; with w = 1 the least of the devices' time is taken from scoring. Between them
lie the best plans, but for what changes take: w is the price of the devices' time, which has to do for all that is to
be decoded and scored, in terms of the rollout's (as in `oracle.blind_bound_s`, where it may rise with time).

A plan's makespan is the time to the last token, and then the time to score what is left: all devices share that, but
one of them scores the last sample alone. Or it is the end of the sample with the longest context, which takes the
longest to score, if that comes later.
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
_WEIGHTS: Floats = np.linspace(0, 1, 11)
"""Of the devices' time, of which each gives a plan."""
_LEAST_GAIN = 0.005
"""Part of the time to come that a change of the number of engines must save: estimates are no better than that."""
_PATIENCE = 0.995
"""A change is made now if it gains at least this part of what the best later one would, for the future is uncertain."""
_FEWER = 0.9
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
    if max(num_now, most) == 1:
        return 1
    plans = best_plans(outlook, most)
    is_change = plans[:, 0] != num_now
    if not is_change.any():
        return num_now
    seconds = makespans(outlook, plans)
    now_s, never_s = np.where(is_change, seconds[:, 0], np.inf), float(seconds[:, -1].min())
    later_s = min(seconds[:, 1:].min(), seconds[~is_change, 0].min(initial=np.inf))
    best = int(np.argmin(now_s))
    gain_s, later_gain_s = never_s - float(now_s[best]), never_s - float(later_s)
    is_worth_it = gain_s > _LEAST_GAIN * never_s and gain_s >= _PATIENCE * later_gain_s
    return int(plans[best, 0]) if is_worth_it else num_now


def best_plans(outlook: Outlook, most: int) -> Ints:
    """For each weight, the best numbers of engines from each point on, [weights, points], none of them growing."""
    num_now, ahead = len(outlook.live), _ahead(outlook)
    fewer = np.append(num_now * _FEWER ** np.arange(64), [num_now - 1, 1])
    more = np.linspace(num_now, max(num_now, most), 4)
    choices = np.unique(np.concatenate([fewer, more]).round().astype(np.int64).clip(1))[::-1]  # of equals the first
    seconds, busy = _evenly(outlook, ahead, np.tile(choices[:, None], len(ahead.left)))
    weight = _WEIGHTS[:, None, None, None]
    weighted_s = (seconds * (1 - weight + weight * busy / outlook.num_devices)).mean(axis=1)
    plans: Ints = np.minimum.accumulate(choices[np.argmin(weighted_s, axis=1)], axis=1)
    return plans


def makespans(outlook: Outlook, plans: Ints) -> Floats:
    """Seconds from now if engines stay as they are up to some point, and then are as planned, [plans, points].

    plans: engines from each point on, [plans, points], none of them growing. Points are counts of samples left, the
    first of them now. Means over the draws.
    """
    costs, ahead, num_now = outlook.costs, _ahead(outlook), len(outlook.live)
    num_live = outlook.remaining.shape[1]
    share = _share_of_others(ahead.live, num_live)
    # Engines as they are: the last sample is on one of them as likely as any other sample is.
    typical = costs.at(num_live / num_now, float(outlook.context_tokens.sum()) / num_now)
    load = typical.sample_s * outlook.live + typical.context_s * outlook.context_tokens
    skew = float(outlook.live @ load) / max(float(load.sum()), 1e-12)
    seconds_now = ahead.steps * _step_s(outlook, skew, share, ahead.context)
    busy_now = _busy(share[..., None], outlook.live, outlook.live / num_live).sum(axis=-1)
    seconds_then, busy_then = _evenly(outlook, ahead, plans)

    by_load = np.append(0, np.cumsum(np.sort(outlook.live)[::-1])) / num_live
    stays_first = np.where(plans <= num_now, by_load[np.minimum(plans, num_now)], num_now / plans)
    stays_next = np.ones(plans.shape)
    stays_next[:, 1:] = plans[:, 1:] / plans[:, :-1]
    first_s, next_s = (_change_s(outlook, ahead, plans, stays) for stays in (stays_first, stays_next))

    # [draws, plans, points, intervals].
    points = np.arange(len(ahead.left))
    is_changed = points[:, None] <= points
    seconds = np.where(is_changed, (seconds_then + next_s)[:, :, None], _per_plan(seconds_now))
    seconds[..., points, points] = seconds_then + first_s
    busy = np.where(is_changed, busy_then[:, :, None], _per_plan(busy_now))

    token_s = costs.inference_token_s + costs.inference_s / min(costs.inference_batch_tokens, _PIECE_TOKENS)
    # Before each interval, and at the end.
    arriving_s = np.insert(ahead.finished_tokens, 0, outlook.backlog_tokens, axis=1) * token_s
    surplus_s = _per_plan(arriving_s[:, :-1]) - (outlook.num_devices - busy) * seconds
    ahead_s = np.maximum(0.0, np.cumsum(surplus_s[..., ::-1], axis=-1).max(axis=-1))
    backlog_s = arriving_s[:, -1:, None] + ahead_s
    last_s = costs.inference_s + costs.inference_token_s * ahead.last_context[..., None]
    total_s = seconds.sum(axis=-1) + np.maximum(last_s, backlog_s / outlook.num_devices)

    widest, widest_context = outlook.widest
    widest_remaining = outlook.remaining[:, widest, None]
    passed = np.clip((widest_remaining - ahead.starts) / np.maximum(ahead.steps, 1e-9), 0.0, 1.0)
    scoring_s = costs.inference_s + costs.inference_token_s * (widest_context + widest_remaining)
    widest_s = (seconds * _per_plan(passed)).sum(axis=-1) + scoring_s[..., None]
    latest_s: Floats = np.maximum(total_s, widest_s).mean(axis=0)
    return latest_s


@dataclass(frozen=True, slots=True, eq=False)
class _Ahead:
    """The points, at which so many samples are `left` [points], and the interval from each to the next.

    Of each draw, [draws, points]: `starts`, steps up to the point; `steps` of the interval, the mean samples `live` and
    tokens of `context` of each in it, and what has finished at its end. last_context [draws, 1]: tokens of the last.
    """

    left: Ints
    starts: Floats
    steps: Floats
    live: Floats
    context: Floats
    finished_tokens: Floats
    last_context: Floats


def _ahead(outlook: Outlook) -> _Ahead:
    num_live = outlook.remaining.shape[1]
    context_now = float(outlook.context_tokens.sum()) / num_live
    ascending = np.sort(outlook.remaining, axis=1)
    longest = ascending[:, -1:]
    left = _points(num_live)
    starts = np.where(left < num_live, ascending[:, num_live - 1 - left], 0.0)
    steps = np.diff(starts, append=longest)
    shorter = np.cumsum(np.pad(ascending, ((0, 0), (1, 0))), axis=1)  # steps of all but the longest so many
    taken = left * starts + shorter[:, num_live - left]
    live = np.diff(taken, append=shorter[:, -1:]) / np.maximum(steps, 1e-9)
    context = context_now + starts + steps / 2
    finished_tokens = -np.diff(left, append=0) * (context + steps / 2)
    return _Ahead(left, starts, steps, live, context, finished_tokens, context_now + longest)


def _per_plan(values: Floats) -> Floats:
    """[draws, intervals] of every plan, to go with [draws, plans, points, intervals]."""
    return values[:, None, None, :]


@cache
def _points(num_live: int) -> Ints:
    return np.unique(np.geomspace(num_live, 1, _NUM_POINTS).round().astype(np.int64))[::-1]


def _evenly(outlook: Outlook, ahead: _Ahead, plans: Ints) -> tuple[Floats, Floats]:
    """Seconds of each interval, and busy engines in it, [draws, plans, intervals]: engines are evenly loaded before it.

    plans: engines in each interval, [plans, intervals].
    """
    engines = np.minimum(plans, ahead.left)
    share, each = _share_of_others(ahead.live, ahead.left)[:, None], ahead.left / engines
    seconds = ahead.steps[:, None] * _step_s(outlook, each, share, ahead.context[:, None])
    return seconds, engines * _busy(share, each, 1 / engines)


def _share_of_others(live: Floats, of: Ints | int) -> Floats:
    """How many of so many samples, the last left out, are live."""
    share: Floats = np.clip((live - 1) / np.maximum(of - 1, 1), 0.0, 1.0)
    return share


def _busy(share: Floats, each: Floats | Ints, has_last: Floats) -> Floats:
    """The chance that an engine with so many samples has any left, for such a chance that it has the last."""
    busy: Floats = has_last + (1 - has_last) * (1 - (1 - share) ** each)
    return busy


def _step_s(outlook: Outlook, each: Floats | float, share: Floats, context: Floats) -> Floats:
    """Seconds per token of the last sample on an engine that had `each`; where batches are full, samples take turns."""
    batch = 1 + np.maximum(0.0, each - 1) * share
    turns = np.maximum(1.0, batch / outlook.max_batch)
    return fastest(outlook.costs, lambda one: turns * one.step_s + batch * (one.sample_s + one.context_s * context))


def _change_s(outlook: Outlook, ahead: _Ahead, plans: Ints, stays: Floats) -> Floats:
    """Seconds that it takes to go over to so many engines, [draws, plans, points].

    stays: the part of the samples that are where they are to be, [plans, points].

    What moves is computed again by engines that stand still meanwhile, or is copied while the others go on.
    """
    costs, moved = outlook.costs, (1 - stays) * ahead.left
    context = (ahead.context - ahead.steps / 2)[:, None]
    seconds = costs.prefill_s + costs.prefill_token_s * context * np.maximum(moved / plans, 1.0)
    if outlook.can_transfer:
        transfer_s = costs.transfer_s + costs.transfer_byte_s * costs.kv_bytes_per_token * context
        seconds = np.minimum(seconds, transfer_s * (1 - stays))
    return np.where(moved > 0, seconds, 0.0)
