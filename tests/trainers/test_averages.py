"""Whole runs that keep a moving average of the policy's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fuse.intrastage.optimizer import ModelOptimizer

from . import tiny

DECAY = 0.8
OPTIONS: dict[str, Any] = {
    "ema_decay": DECAY,
    "total_episodes": 24,
    "save_strategy": "steps",
    "save_steps": 1,
    "num_sample_generations": 0,
}


@pytest.mark.usefixtures("in_process_workers")
def test_the_average_is_saved_beside_the_policy_and_goes_on_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, torch.Tensor]] = []

    def remember(optimizer: ModelOptimizer, norm: float, learning_rate: float) -> None:
        apply(optimizer, norm, learning_rate)
        if optimizer._name == "actor":
            parts = optimizer.state()
            weights.append({name: tensors["parameter"].clone() for name, tensors in parts})

    apply = ModelOptimizer.apply
    whole = tiny.trainer(tmp_path, num_devices=1, **OPTIONS)
    average = {name: one.detach().clone() for name, one in whole.policy_model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(ModelOptimizer, "apply", remember)
        whole.train()
    assert len(weights) == 6, "2 steps of 3 updates"
    for step in weights:
        average = {name: DECAY * one + (1 - DECAY) * step[name] for name, one in average.items()}
    assert whole.ema_model is not None
    for name, one in whole.ema_model.named_parameters():
        torch.testing.assert_close(one.detach(), average[name], rtol=0, atol=1e-6)
    assert tiny.difference(whole.ema_model, whole.policy_model) > 1e-3

    whole.save_model()
    for directory in (tmp_path, tmp_path / "checkpoint-3"):
        for part, model in {"ema": whole.ema_model, ".": whole.policy_model}.items():
            assert tiny.difference(AutoModelForCausalLM.from_pretrained(directory / part), model) == 0.0

    resumed = tiny.trainer(tmp_path / "resumed", num_devices=1, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.ema_model is not None
    assert tiny.difference(resumed.ema_model, whole.ema_model) == 0.0


@pytest.mark.usefixtures("pooled_workers")
def test_stages_and_replicas_average_as_one_device_does(tmp_path: Path) -> None:
    """Two replicas on two devices keep a part of the average each; with stages, each keeps its own."""
    options = {**OPTIONS, "save_strategy": "no", "inter_stage_fusion": False, "num_micro_batches": 1}
    one = tiny.train(tmp_path / "one", num_devices=1, **options)
    assert one.ema_model is not None
    for actor_stages in (1, 2):
        two = tiny.train(tmp_path / f"two-{actor_stages}", num_devices=2, actor_stages=actor_stages, **options)
        assert two.ema_model is not None
        assert tiny.difference(two.ema_model, one.ema_model) < tiny.ROUNDING
        assert tiny.difference(two.ema_model, two.policy_model) > 1e-3
