"""How fast a rollout could be at best: a bound that no policy beats, even one that knows all lengths."""

from __future__ import annotations

import numpy as np

from fuse.interstage.rollout import Rollout


def lower_bound_s(rollout: Rollout) -> float:
    """The greater of two bounds on the makespan, in seconds, whatever moves where and for free.

    Path: a sample is prefilled, decoded alone, and scored alone. Work: all prefill, decoding in full batches and
    inference, spread evenly over the devices.
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
