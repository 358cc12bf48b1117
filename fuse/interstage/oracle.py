"""How fast a rollout could be at best: a bound that no policy beats, even one that knows all lengths.

It is a bound and no schedule. A policy that knows lengths may come close: it decodes long samples with few others from
the start, and alike ones together. One that does not know them starts with even batches and learns who is long only as
others finish, so part of the bound's gain is the worth of knowing; `fuse simulate` shows a policy that knows beside it.
"""

from __future__ import annotations

import numpy as np

from fuse.interstage.rollout import Rollout


def lower_bound_s(rollout: Rollout) -> float:
    """The greater of two bounds on the makespan, in seconds, whatever moves where and for free.

    Path: a sample is prefilled, takes one step per token, in each of which it is alone at best, and then is scored,
    with nothing else in its micro-batches. Work: devices do one thing at a time, so the makespan is at least the mean
    of their busy times. All prefill, each sample's part of its steps and all inference are done somewhere; `step_s` is
    paid once per step of an engine, of which there are as many as the longest sample has tokens, and as many as it
    takes when no step serves more samples than an engine can hold; `inference_s` once per micro-batch, were all full.
    """
    costs, prompts, responses = rollout.costs, rollout.prompt_tokens, rollout.response_tokens
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
        costs.prefill_token_s * prompts.sum()
        + costs.step_s * fewest_steps
        + own_s.sum()
        + fewest_batches * costs.inference_s
        + inference_s.sum()
    ) / rollout.num_devices
    return float(max(path_s.max(), work_s))


def _largest_batch(rollout: Rollout) -> int:
    """Samples that one engine can hold at most: those with the shortest prompts."""
    reserved = np.sort(rollout.prompt_tokens + rollout.limits.max_new_tokens)
    held = int(np.searchsorted(np.cumsum(reserved), rollout.limits.kv_capacity_tokens, side="right"))
    return max(1, min(held, rollout.limits.max_batch))
