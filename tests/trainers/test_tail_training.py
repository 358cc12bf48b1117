"""Runs that train before their last samples are there: the tokens and weights of runs that do not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fuse.interstage.rollout_planner import RolloutPlanner
from fuse.workers.errors import WorkerError
from fuse.workers.model_handle import ModelHandle

from ..tiny_models import DECODED_BY_MODULES
from . import tiny, tiny_group

pytestmark = pytest.mark.usefixtures("pooled_workers", "_policy_that_knows_no_costs")

LONG = 300
"""Tokens of the last sample of every update, which decode while the others are trained on; those have few."""
MODELS: dict[str, Any] = {"max_position_embeddings": 512, **DECODED_BY_MODULES}


@pytest.fixture
def _policy_that_knows_no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By costs as measured on busy cores, so few tokens may not be worth scoring or training before all are there."""
    monkeypatch.setattr(RolloutPlanner, "policy", lambda self, samples: self.fixed_policy(len(samples)))


def group_run(output_dir: Path, resume: bool = False, **options: Any) -> Any:
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
    made.train(resume_from_checkpoint=resume)
    return made


def ppo_run(output_dir: Path, **options: Any) -> Any:
    """Three updates of 8 samples, one of which is long; actor and critic are pipelines over both devices."""
    options = {"num_devices": 2, "total_episodes": 24, "num_ppo_epochs": 1, **options}
    options |= {"adaptive_kl": True, "kl_horizon": 40, "stop_token": "none", "response_length": LONG, "models": MODELS}
    made = tiny.trainer(output_dir, **options)
    made.max_new_tokens = {sample: LONG if sample % 8 == 5 else 3 + sample % 4 for sample in range(32)}
    made.train()
    return made


def last(trainer: Any) -> dict[str, float]:
    """What the last update logged."""
    logs: dict[str, float] = [entry for entry in trainer.state.log_history if "time/total" in entry][-1]
    return logs


def most_early(trainer: Any) -> float:
    """The largest share of an update that was trained early: on busy cores the long sample may be done before others
    are scored."""
    return max((entry.get("tail/share", 0.0) for entry in trainer.state.log_history), default=0.0)


def test_complete_groups_are_trained_early(tmp_path: Path) -> None:
    early = group_run(tmp_path / "early")
    plain = group_run(tmp_path / "plain", tail_training="off")
    assert most_early(early) > 0
    assert "tail/share" not in last(plain)
    assert tiny.difference(early.model, plain.model) < tiny.ROUNDING
    for name in ("loss", "reward", "grad_norm", "entropy"):
        assert last(early)[name] == pytest.approx(last(plain)[name], rel=1e-3, abs=1e-6)
    assert tiny.difference(early.model, tiny.policy(**MODELS)) > 100 * tiny.ROUNDING


def test_a_model_worker_that_dies_in_the_tail_costs_the_update_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with what it trains early of the second update, which is done again from the checkpoint before it."""
    accumulate, output_dir = ModelHandle.accumulate, tmp_path / "killed"
    killed: list[int] = []

    def accumulate_and_die(worker: ModelHandle, *arguments: Any) -> Any:
        call = accumulate(worker, *arguments)
        if not killed and (output_dir / "checkpoint-1").exists():
            killed.append(worker.worker.process_id)
            os.kill(killed[0], signal.SIGKILL)
        return call

    plain = group_run(tmp_path / "plain", tail_training="off")
    saving = {"save_strategy": "steps", "save_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(ModelHandle, "accumulate", accumulate_and_die)
        with pytest.raises(WorkerError, match=r"model worker on device \d failed: its process died"):
            group_run(output_dir, **saving)
    assert killed
    resumed = group_run(output_dir, resume=True, **saving)
    assert resumed.state.global_step == 2
    assert tiny.difference(resumed.model, plain.model) < tiny.ROUNDING


@pytest.mark.parametrize(
    ("early_options", "plain_options"),
    [({"critic_stages": 1}, {"critic_stages": 1, "tail_training": "off"}), ({"tail_sharing": [1, 1]}, {})],
    ids=["replicas", "pipeline"],
)
def test_the_critic_is_trained_early(
    early_options: dict[str, Any], plain_options: dict[str, Any], tmp_path: Path
) -> None:
    """Once costs are known by which actor and critic train at once: in the third update, if not before.

    A pipeline over both devices trains while one of them decodes, if that is said to cost nothing; of two cores it is
    known what it costs.
    """
    early = ppo_run(tmp_path / "early", **early_options)
    plain = ppo_run(tmp_path / "plain", **plain_options)
    assert most_early(early) > 0
    assert most_early(plain) == 0
    assert tiny.difference(early.model, plain.model) < tiny.ROUNDING
    assert tiny.difference(early.value_model, plain.value_model) < tiny.ROUNDING
