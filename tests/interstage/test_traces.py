"""What the policies save on recorded lengths; skipped where the traces are not at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuse.interstage.adaptive import Adaptive
from fuse.interstage.costs import PROFILES
from fuse.interstage.length_trace import read_length_trace
from fuse.interstage.lengths import KnownLengths, Observation, learn
from fuse.interstage.migration import EngineLimits, Policy, StageByStage
from fuse.interstage.oracle import blind_bound_s, lower_bound_s
from fuse.interstage.rollout import Rollout
from fuse.interstage.simulate import simulate
from fuse.interstage.tuning import LengthHistory, tune_threshold

from ..examples import examples

TRACES = sorted(Path(__file__).parents[3].glob("shared/data/lengths_*.csv"))
COSTS = PROFILES["llama-33b-8xh800"]
NUM_BATCHES, NUM_SAMPLES, NUM_DEVICES, NUM_PAST = examples(3), 128, 16, 1000
ROUNDING = 1 + 1e-9


@pytest.mark.skipif(not TRACES, reason="no traces in ../shared/data")
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_adaptive_keeps_up_with_threshold_on_recorded_lengths(path: Path) -> None:
    trace = read_length_trace(path, prompt_tokens=128)
    longest = int(trace.response_tokens.max())
    limits = EngineLimits(max_batch=256, kv_capacity_tokens=10**9, max_new_tokens=longest)
    rest = slice(NUM_BATCHES * NUM_SAMPLES, NUM_BATCHES * NUM_SAMPLES + NUM_PAST)
    past = LengthHistory(prompt_tokens=trace.prompt_tokens[rest], response_tokens=trace.response_tokens[rest])
    threshold = tune_threshold(
        past, num_samples=NUM_SAMPLES, num_devices=NUM_DEVICES, costs=COSTS, limits=limits,
        remaining_shares=(0.1, 0.4), kept_shares=(0.25, 1.0),
    )  # fmt: skip
    lengths = learn([Observation(int(tokens)) for tokens in past.response_tokens], longest).for_samples()
    seconds = {"none": 0.0, "threshold": 0.0, "adaptive": 0.0, "known": 0.0}
    bound_s = blind_s = 0.0
    for start in range(0, NUM_BATCHES * NUM_SAMPLES, NUM_SAMPLES):
        batch = slice(start, start + NUM_SAMPLES)
        rollout = Rollout(
            prompt_tokens=trace.prompt_tokens[batch],
            response_tokens=trace.response_tokens[batch],
            num_devices=NUM_DEVICES,
            costs=COSTS,
            limits=limits,
        )
        policies: dict[str, Policy] = {
            "none": StageByStage(),
            "threshold": threshold,
            "adaptive": Adaptive(COSTS, lengths),
            "known": Adaptive(COSTS, KnownLengths(rollout.response_tokens)),
        }
        for name, policy in policies.items():
            seconds[name] += simulate(rollout, policy).makespan_s
        bound_s += lower_bound_s(rollout)
        blind_s += blind_bound_s(rollout)
    assert seconds["adaptive"] <= 1.02 * seconds["threshold"]
    assert seconds["adaptive"] <= seconds["none"] * ROUNDING
    assert bound_s <= seconds["known"] * ROUNDING
    assert blind_s <= seconds["adaptive"] * 1.005  # it bounds the mean over many rollouts, of which these are few
    assert seconds["known"] <= seconds["adaptive"] * ROUNDING
