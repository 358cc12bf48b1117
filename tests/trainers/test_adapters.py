"""Runs that train adapters over a frozen base, which is the reference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from fuse import PPOTrainer

from . import tiny

pytestmark = pytest.mark.usefixtures("pooled_workers")

LORA = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"])


def trainer(output_dir: Path, *, ref_model: Any = None, models: Any = (), **options: Any) -> PPOTrainer:
    torch.manual_seed(0)  # PEFT draws A
    return PPOTrainer(
        args=tiny.config(output_dir, **options),
        processing_class=tiny.tokenizer(),
        model=tiny.policy(**dict(models)),
        ref_model=ref_model,
        reward_model=tiny.count_a,
        train_dataset=tiny.rows(),
        value_model=tiny.scorer(1),
        peft_config=LORA,
        value_peft_config=LORA,
    )


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}


def test_adapters_are_what_trains_however_it_is_scheduled(tmp_path: Path) -> None:
    made = trainer(tmp_path / "one", num_devices=1)
    start = copy.deepcopy(made.model.state_dict())
    made.train()
    moved = {name for name, one in made.model.state_dict().items() if not torch.equal(one, start[name])}
    assert moved == set(trained(made.model))
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name in trained(made.policy_model)}
    runs = {
        "fused": {},
        "serial": {"scoring": "sharded", "intra_stage_fusion": False, "inter_stage_fusion": False},
    }
    for name, options in runs.items():
        other = trainer(tmp_path / name, num_devices=2, **options)
        other.train()
        for row, expected in zip(other.state.log_history, made.state.log_history, strict=True):
            assert row["val/sampler_logprob_diff"] < 1e-5
            assert row["objective/kl"] == pytest.approx(expected["objective/kl"], abs=1e-5)
        assert tiny.difference(other.model, made.model) < tiny.ROUNDING, name
    given = trainer(tmp_path / "given", ref_model=tiny.policy())
    given.train()
    assert given.state.log_history[-1]["objective/kl"] == pytest.approx(
        made.state.log_history[-1]["objective/kl"], abs=1e-6
    )
    assert abs(given.state.log_history[-1]["objective/kl"]) > 1e-2
