"""Tuning of R_t and m: it finds what is plainly best, and a rollout in miniature stands for the whole."""

from __future__ import annotations

import numpy as np

from fuse.interstage import tuning
from fuse.interstage.costs import CostModel
from fuse.interstage.migration import EngineLimits, StageByStage, Threshold
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.tuning import LengthHistory, expected_gain, tune_threshold

LIMITS = EngineLimits(max_batch=64, kv_capacity_tokens=10**9, max_new_tokens=200)
# One sample in eight is twenty times as long as the others, so nearly every engine has one.
HISTORY = LengthHistory(prompt_tokens=np.full(64, 1000), response_tokens=np.array([200, *[10] * 7] * 8))


def costs(inference_token_s: float) -> CostModel:
    return CostModel(
        step_s=0.01, sample_s=0.0, context_s=0.0, prefill_s=0.0, prefill_token_s=0.0, inference_s=0.0,
        inference_token_s=inference_token_s, kv_bytes_per_token=1, transfer_s=0.0, transfer_byte_s=0.0,
    )  # fmt: skip


def tuned(inference_token_s: float, num_samples: int = 64, num_devices: int = 8) -> Threshold:
    return tune_threshold(
        HISTORY, num_samples=num_samples, num_devices=num_devices, costs=costs(inference_token_s), limits=LIMITS
    )


def next_rollout(inference_token_s: float) -> Rollout:
    prompt_tokens, response_tokens = HISTORY.draw(64, seed=7)
    return Rollout(
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        num_devices=8,
        costs=costs(inference_token_s),
        limits=LIMITS,
    )


def test_the_tail_is_consolidated_when_inference_needs_the_devices() -> None:
    policy, rollout = tuned(5e-4), next_rollout(5e-4)
    assert policy.num_kept < 8
    fused, serial = simulate(rollout, policy), simulate(rollout, StageByStage())
    assert fused.makespan_s < 0.9 * serial.makespan_s


def test_nothing_moves_when_inference_is_free() -> None:
    assert simulate(next_rollout(0.0), tuned(0.0)).num_migrations == 0


def pays(num_samples: int, num_devices: int, inference_token_s: float = 5e-4) -> bool:
    given = {"num_devices": num_devices, "costs": costs(inference_token_s), "limits": LIMITS}
    policy = Threshold(num_samples // 4, max(1, num_devices // 4))
    return tuning.pays(expected_gain(policy, HISTORY, num_samples=num_samples, **given))


def test_fusion_pays_where_several_devices_have_a_tail_to_share() -> None:
    assert pays(64, 8)
    assert not pays(64, 1)
    assert pays(64 * 1024, 1024), "64 to a device, few devices in miniature"


def test_tuning_scales_with_the_rollout() -> None:
    small, large = tuned(5e-4), tuned(5e-4, num_samples=64 * 1024, num_devices=8 * 1024)
    assert large.num_kept > 8
    assert large.remaining > small.remaining
