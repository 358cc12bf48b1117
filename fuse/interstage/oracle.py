"""How fast a rollout could be at best, for those who know all lengths beforehand and for those who do not.

Both are bounds and no schedules. A policy that knows lengths decodes long samples with few others from the start, and
alike ones together. One to which samples look alike starts with even batches and learns who is long only as others
finish: the difference between the bounds is what knowing would be worth.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fuse.interstage.costs import CostModel, fastest, least
from fuse.interstage.rollout import Rollout

Floats = NDArray[np.float64]

_NUM_WEIGHTS = 41
"""Weights that are tried of each bound: each mean is a bound, the best of more of them is a little higher."""


def lower_bound_s(rollout: Rollout) -> float:
    """The greater of two bounds on the makespan, in seconds, whatever moves where and for free.

    Path: a sample is prefilled, takes one step per token, alone at best, and is then scored, with nothing else in its
    micro-batches. Work: devices do one thing at a time, so the makespan is at least the mean of their busy times. All
    prefill, each sample's part of its steps and all inference are done somewhere. `step_s` is paid once per step of an
    engine: there are at least as many steps as the longest sample has tokens, and as many as all tokens take in steps
    of the largest batch. `inference_s` is paid once per micro-batch, of which there are fewest if all are full. Where
    engines draft, each part of a step costs what it does with the number of drafts that is best for that part.
    """
    costs, prompts, responses = least(rollout.costs), rollout.prompt_tokens, rollout.response_tokens
    totals = prompts + responses
    own_s = responses * (costs.sample_s + costs.context_s * (prompts + (responses - 1) / 2))
    decode_s = responses * costs.step_s + own_s
    inference_s = costs.inference_token_s * totals
    num_batches = np.ceil(totals / costs.inference_batch_tokens)
    path_s = (
        costs.prefill_s + costs.prefill_token_s * prompts + decode_s + num_batches * costs.inference_s + inference_s
    )

    fewest_steps = max(int(responses.max()), -(-int(responses.sum()) // _largest_batch(rollout)))
    fewest_batches = -(-int(totals.sum()) // costs.inference_batch_tokens)
    work_s = (
        costs.prefill_token_s * rollout.distinct_prompt_tokens
        + costs.step_s * fewest_steps
        + own_s.sum()
        + fewest_batches * costs.inference_s
        + inference_s.sum()
    ) / rollout.num_devices
    return float(max(path_s.max(), work_s))


def blind_bound_s(rollout: Rollout) -> float:
    """The same for policies to which all samples of an age look alike, and which keep them at about one age.

    Of l samples that are live at an age, n engines have l / n each, and the longest one, too: where some samples share
    with fewer, others share with more. With all devices decoding, the longest sample ends soonest; with few, most time
    is left to score what has finished. At any age the time to come is at least what devices have yet to decode and to
    score, shared by all of them, and at the end it is what the last sample takes to score. A weighted mean of these
    bounds is one, too. Given weights, each age has a best n, and the best weights are found age by age: in the bounds
    from earlier ages, of weight `earlier`, a step counts by the devices that it holds, in the others by its time.

    This bounds the mean over rollouts, and not each of them: a policy that happens to leave the longest sample with few
    others may do better. Where engines draft, a small batch gains more than a large one loses, so that uneven batches
    may do a little better on average, too.
    """
    costs, lengths, num_devices = rollout.costs, rollout.response_tokens, rollout.num_devices
    longest_first = np.argsort(-lengths, kind="stable")
    prompts = rollout.prompt_tokens[longest_first]
    age = np.arange(lengths.max())
    live = np.searchsorted(np.sort(-lengths), -age, side="left")  # samples with more tokens than that
    context = np.cumsum(prompts)[live - 1] / live + age
    earlier = np.linspace(0, 1, _NUM_WEIGHTS)

    least_s = np.full((len(age), len(earlier)), np.inf)
    for num_engines in range(1, num_devices + 1):
        engines = np.minimum(num_engines, live)
        step_s = _step_s(costs, live / engines, context)
        least_s = np.minimum(least_s, step_s[:, None] * (1 - earlier + earlier * (engines / num_devices)[:, None]))
    token_s = costs.inference_token_s + costs.inference_s / costs.inference_batch_tokens
    finished_tokens = np.bincount(lengths - 1, rollout.prompt_tokens + lengths)
    least_s += earlier * (finished_tokens * token_s / num_devices)[:, None]
    from_start_s = np.zeros(len(earlier))
    for of_age_s in least_s:
        from_start_s = np.maximum.accumulate(from_start_s) + of_age_s
    last_s = costs.inference(int(prompts[0] + lengths.max()))
    prefill_s = costs.prefill(rollout.distinct_prompt_tokens // num_devices)
    return max(lower_bound_s(rollout), prefill_s + float((from_start_s + (1 - earlier) * last_s).max()))


def _step_s(costs: CostModel, batch: Floats, context: Floats) -> Floats:
    """Of batches of samples with so much context each."""
    return fastest(costs, lambda one: one.step_s + batch * (one.sample_s + one.context_s * context))


def _largest_batch(rollout: Rollout) -> int:
    """Samples that one engine can hold at most: those with the shortest prompts."""
    reserved = np.sort(rollout.prompt_tokens + rollout.limits.max_new_tokens)
    held = int(np.searchsorted(np.cumsum(reserved), rollout.limits.kv_capacity_tokens, side="right"))
    return max(1, min(held, rollout.limits.max_batch))
