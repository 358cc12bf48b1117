"""Whole runs in which the critic trains more than the actor, before it, and at another rate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fuse import PPOTrainer
from fuse.metric_table import is_timed

from ..worker_pool import WorkerPool
from . import tiny

pytestmark = pytest.mark.usefixtures("pooled_workers")

OPTIONS: dict[str, Any] = {
    "total_episodes": 24,
    "num_ppo_epochs": 1,
    "critic_ppo_epochs": 2,
    "critic_num_mini_batches": 2,
    "critic_learning_rate": 3e-3,
    "critic_warmup_updates": 1,
    "cliprange_value": None,
    "loss_normalization": "token",
    "adaptive_kl": True,
    "kl_target": 0.1,
    "kl_horizon": 40,
    "inter_stage_fusion": False,  # inference adds up in the order of its batches
    "num_micro_batches": 1,  # another number adds up in another order
    "num_sample_generations": 0,
}


def logged(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not is_timed(name)} for row in trainer.state.log_history]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, worker_pool: WorkerPool) -> tuple[PPOTrainer, Any]:
    """A run on two devices, and its initial policy; the third update's rounds are planned."""
    with worker_pool.in_use():
        made = tiny.trainer(
            tmp_path_factory.mktemp("fused"), num_devices=2, save_strategy="steps", save_steps=1, **OPTIONS
        )
        initial = copy.deepcopy(made.policy_model)
        made.train()
        return made, initial


def test_serial_training_and_one_device_without_regrouping_arrive_at_the_same_weights(
    fused: tuple[PPOTrainer, Any], tmp_path: Path
) -> None:
    two, _ = fused
    serial = tiny.train(tmp_path / "serial", num_devices=2, intra_stage_fusion=False, balance_stages=False, **OPTIONS)
    assert tiny.difference(two.policy_model, serial.policy_model) < 1e-6
    assert tiny.difference(two.value_model, serial.value_model) < 1e-6
    for row, expected in zip(logged(two), logged(serial), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    as_drawn = {**OPTIONS, "num_micro_batches": None, "regroup_micro_batches": False}
    one = tiny.train(tmp_path / "one", num_devices=1, **as_drawn)
    assert tiny.difference(two.policy_model, one.policy_model) < tiny.ROUNDING
    assert tiny.difference(two.value_model, one.value_model) < tiny.ROUNDING
    for row, other in zip(logged(two), logged(one), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert 0 <= two.state.log_history[-1]["bubble/planned"] < 1
    assert 0 <= two.state.log_history[-1]["bubble/serial"] < 1


def test_a_warm_up_trains_the_critic_alone(fused: tuple[PPOTrainer, Any]) -> None:
    made, initial = fused
    saved = [
        AutoModelForCausalLM.from_pretrained(Path(str(made.args.output_dir)) / f"checkpoint-{update}")
        for update in (1, 2)
    ]
    assert tiny.difference(saved[0], initial) == 0.0
    assert tiny.difference(saved[1], initial) > 1e-3
    first, second, _ = made.state.log_history
    only_later = {name for name in second if name not in first and not name.startswith("bubble/")}
    assert {"loss/policy_avg", "val/ratio", "grad_norm/actor"} <= only_later
    assert first["grad_norm/critic"] > 0
    assert first["loss/value_avg"] != second["loss/value_avg"]
    assert first["val/clipfrac_avg"] == 0.0


def test_rates_and_the_coefficient_of_the_kl_are_logged(fused: tuple[PPOTrainer, Any]) -> None:
    made, _ = fused
    for row in made.state.log_history:
        assert row["lr/critic"] == pytest.approx(0.3 * row["lr"])
    coefficients = [row["objective/kl_coef"] for row in made.state.log_history]
    assert coefficients[0] == made.args.kl_coef
    for before, after, row in zip(coefficients, coefficients[1:], made.state.log_history, strict=False):
        error = min(max(row["objective/kl"] / 0.1 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error * 8 / 40))
        assert after != before


def test_a_resumed_run_goes_on_to_the_bit(fused: tuple[PPOTrainer, Any], tmp_path: Path) -> None:
    made, _ = fused
    checkpoint = Path(str(made.args.output_dir)) / "checkpoint-2"
    resumed = tiny.trainer(tmp_path, num_devices=2, **OPTIONS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed)[-1]["objective/kl_coef"] == made.state.log_history[-1]["objective/kl_coef"]
    assert resumed.state.kl_coef == made.state.kl_coef
    assert tiny.difference(resumed.policy_model, made.policy_model) == 0.0
    assert tiny.difference(resumed.value_model, made.value_model) == 0.0
