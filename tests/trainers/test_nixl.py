"""A run whose samples move by NIXL is the run in which they stay."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fuse.interstage.costs import SMALL_CPU
from fuse.interstage.migration import Action, Migrate, RolloutState, feed
from fuse.interstage.rollout_planner import RolloutPlanner
from fuse.workers import generation_handle

from ..workers.holding import HeldUntilOthersCome
from . import tiny


def _gather_on_the_first(state: RolloutState) -> list[Action]:
    """Move samples once tokens of theirs are known: KV is moved of no others."""
    live = state.live
    moves: list[Action] = [
        Migrate(int(sample), int(device), 0)
        for sample, device, ready in zip(live.ids, live.devices, live.movable & live.started, strict=True)
        if device != 0 and ready
    ]
    return [*moves, *feed(state, moves)]


def _train(output_dir: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """One update: the weights afterwards, and every response."""
    responses: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], target: list[int]) -> list[float]:
        responses.append(completions)
        return tiny.count_a(prompts, completions, target)

    trainer = tiny.trainer(
        output_dir,
        reward=reward,
        models={"max_position_embeddings": 128},
        stop_token=None,
        num_devices=2,
        total_episodes=8,
        response_length=100,
        num_sample_generations=0,
        **options,
    )
    # Of each engine's samples, however they are dealt, one ends at once, which is when the others move; these are held
    # up until then.
    trainer.max_new_tokens = {sample: 100 if sample % 3 else 5 for sample in range(8)}
    trainer.train()
    return trainer.policy_model.state_dict(), sorted(one for completions in responses for one in completions)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed: make setup-vllm-cpu")
def test_a_run_whose_samples_move_ends_where_the_run_does_in_which_they_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooled_workers: None
) -> None:
    weights, responses = _train(tmp_path / "stay", inter_stage_fusion=False)
    monkeypatch.setattr(generation_handle, "GenerationWorker", HeldUntilOthersCome)
    computing_is_dear = replace(SMALL_CPU, prefill_s=1e3)
    monkeypatch.setattr(RolloutPlanner, "policy", lambda planner, samples: _gather_on_the_first)
    monkeypatch.setattr(RolloutPlanner, "costs", lambda planner: computing_is_dear)
    moved_weights, moved_responses = _train(tmp_path / "move", kv_transfer="nixl")
    assert moved_responses == responses
    for name, tensor in weights.items():
        torch.testing.assert_close(moved_weights[name], tensor, rtol=0, atol=tiny.ROUNDING)
    traces = [json.loads(path.read_text()) for path in (tmp_path / "move" / "traces").glob("iteration-*.json")]
    admits = [event["args"] for trace in traces for event in trace["traceEvents"] if event["name"] == "admit"]
    assert any(sizes["bytes"] for sizes in admits)
    assert not any(sizes["lost"] for sizes in admits)
