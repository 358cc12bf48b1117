"""Bounds that trade engines for devices that score, against the best of all plans."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fuse.interstage.costs import CostModel
from fuse.interstage.migration import EngineLimits
from fuse.interstage.oracle import blind_bound_s
from fuse.interstage.rollout import Rollout


def rollout(seed: int, token_s: float) -> Rollout:
    random = np.random.default_rng(seed)
    num_samples, num_devices = int(random.integers(2, 7)), int(random.integers(2, 4))
    return Rollout(
        prompt_tokens=np.full(num_samples, 20),
        response_tokens=random.integers(1, 6, num_samples),
        num_devices=num_devices,
        costs=CostModel(
            step_s=1.0, sample_s=float(random.uniform(0, 0.5)), context_s=0.0, prefill_s=0.0, prefill_token_s=0.0,
            inference_s=0.0, inference_token_s=token_s, kv_bytes_per_token=1, transfer_s=0.0, transfer_byte_s=0.0,
        ),
        limits=EngineLimits(max_batch=8, kv_capacity_tokens=10**6, max_new_tokens=8),
    )  # fmt: skip


def best_plan_s(case: Rollout) -> float:
    """Of all numbers of engines at each age, if loads are even and what moves is free: scoring is fluid."""
    costs, lengths, num_devices = case.costs, case.response_tokens, case.num_devices
    live = [int((lengths > age).sum()) for age in range(lengths.max())]
    done_s = [20.0 + age + 1 for age in range(len(live))]
    last_s = costs.inference_token_s * done_s[-1]
    makespans_s = []
    for plan in product(range(1, num_devices + 1), repeat=len(live)):
        now_s = backlog_s = 0.0
        for age, num_engines in enumerate(np.minimum(plan, live)):
            step_s = costs.step_s + costs.sample_s * live[age] / num_engines
            now_s += step_s
            backlog_s = max(0.0, backlog_s - (num_devices - num_engines) * step_s)
            backlog_s += costs.inference_token_s * done_s[age] * int((lengths == age + 1).sum())
        makespans_s.append(now_s + max(last_s, backlog_s / num_devices))
    return min(makespans_s)


@pytest.mark.parametrize("token_s", [0.0, 0.02, 0.1])
def test_no_plan_beats_the_blind_bound_and_the_best_is_near(token_s: float) -> None:
    ratios = [blind_bound_s(case) / best_plan_s(case) for case in (rollout(seed, token_s) for seed in range(10))]
    assert max(ratios) <= 1 + 1e-9
    assert np.mean(ratios) > 0.97
    assert min(ratios) > 0.94
    if not token_s:
        assert min(ratios) == pytest.approx(1)
