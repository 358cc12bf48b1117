"""Runs that train before their last samples are there: the tokens and weights of runs that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuse.interstage.rollout_planner import RolloutPlanner

from . import tiny, tiny_group

pytestmark = pytest.mark.usefixtures("pooled_workers")

LONG = 300
"""Tokens of the last sample of every update, which decode while the others are trained on; those have few."""
MODELS: dict[str, Any] = {"max_position_embeddings": 512}


def group_run(output_dir: Path, **options: Any) -> Any:
    """Two updates of 16 samples in groups of 4, one of which is long."""
    options = {
        "num_devices": 2,
        "gradient_accumulation_steps": 4,
        "stop_token": "none",
        "max_completion_length": LONG,
        "model": tiny.policy(**MODELS),
        **options,
    }
    made = tiny_group.trainer(output_dir, **options)
    made.max_new_tokens = {sample: LONG if sample % 16 == 5 else 3 + sample % 4 for sample in range(32)}
    made.train()
    return made


def ppo_run(output_dir: Path, **options: Any) -> Any:
    """Three updates of 8 samples, one of which is long; the actor is a pipeline over both devices."""
    options = {"num_devices": 2, "critic_stages": 1, "total_episodes": 24, "num_ppo_epochs": 1, **options}
    options |= {"adaptive_kl": True, "kl_horizon": 40, "stop_token": "none", "response_length": LONG, "models": MODELS}
    made = tiny.trainer(output_dir, **options)
    made.max_new_tokens = {sample: LONG if sample % 8 == 5 else 3 + sample % 4 for sample in range(32)}
    made.train()
    return made


def last(trainer: Any) -> dict[str, float]:
    """What the last update logged."""
    logs: dict[str, float] = [entry for entry in trainer.state.log_history if "time/total" in entry][-1]
    return logs


def test_complete_groups_are_trained_early(tmp_path: Path) -> None:
    early = group_run(tmp_path / "early")
    plain = group_run(tmp_path / "plain", tail_training="off")
    assert last(early)["tail/share"] > 0
    assert "tail/share" not in last(plain)
    assert tiny.difference(early.model, plain.model) < tiny.ROUNDING
    for name in ("loss", "reward", "grad_norm", "entropy"):
        assert last(early)[name] == pytest.approx(last(plain)[name], rel=1e-3, abs=1e-6)
    assert tiny.difference(early.model, tiny.policy(**MODELS)) > 100 * tiny.ROUNDING


def test_the_critic_is_trained_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once costs are known by which actor and critic train at once: in the third update.

    So few tokens are not worth scoring before all are there, by a policy that knows costs.
    """
    monkeypatch.setattr(RolloutPlanner, "policy", lambda self, samples: self.fixed_policy(len(samples)))
    early = ppo_run(tmp_path / "early")
    plain = ppo_run(tmp_path / "plain", tail_training="off")
    assert last(early)["tail/share"] > 0
    assert tiny.difference(early.model, plain.model) < tiny.ROUNDING
    assert tiny.difference(early.value_model, plain.value_model) < tiny.ROUNDING
