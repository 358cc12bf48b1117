"""Runs that train before their last samples are there: the tokens and weights of runs that do not."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fuse.driver.live_tail import TailRollout
from fuse.engines.engine import GenerationRequest
from fuse.interstage.rollout_planner import RolloutPlanner
from fuse.sample import SampleState
from fuse.workers.errors import WorkerError
from fuse.workers.generation_handle import GenerationHandle
from fuse.workers.model_handle import ModelHandle

from ..tiny_models import DECODED_BY_MODULES
from . import tiny, tiny_group

pytestmark = pytest.mark.usefixtures("pooled_workers", "_policy_that_knows_no_costs", "_long_samples_that_wait")

LONG = 300
"""Tokens of the last sample of every update, which decode while the others are trained on; those have few."""
MODELS: dict[str, Any] = {"max_position_embeddings": 512, **DECODED_BY_MODULES}


@pytest.fixture
def _policy_that_knows_no_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By costs as measured on busy cores, so few tokens may not be worth scoring or training before all are there."""
    monkeypatch.setattr(RolloutPlanner, "policy", lambda self, samples: self.fixed_policy(len(samples)))


@pytest.fixture
def _long_samples_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something may train early, engines get the long samples once it does, or once all else is known and nothing
    can: no clock decides what is seen."""
    submit, submit_all, train = GenerationHandle.submit, TailRollout._submit_all, TailRollout._train
    waiting: list[tuple[GenerationHandle, GenerationRequest]] = []

    def submit_short_ones(engine: GenerationHandle, requests: Sequence[GenerationRequest]) -> Any:
        waiting.extend((engine, one) for one in requests if one.params.max_new_tokens == LONG)
        return submit(engine, [one for one in requests if one.params.max_new_tokens < LONG])

    def submit_all_but_long_ones(rollout: TailRollout) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(GenerationHandle, "submit", submit_short_ones)
            submit_all(rollout)

    def train_and_go_on(rollout: TailRollout) -> None:
        scored = [sample for sample in rollout._table.samples if sample.state is SampleState.SCORED]
        is_all_known = len(rollout._tail._known(scored)) + len(waiting) == len(rollout._table.samples)
        train(rollout)
        while waiting and (rollout._tail.num_trained or is_all_known):
            engine, request = waiting.pop()
            submit(engine, [request])

    monkeypatch.setattr(TailRollout, "_submit_all", submit_all_but_long_ones)
    monkeypatch.setattr(TailRollout, "_train", train_and_go_on)


def forced_lengths(num_samples: int) -> dict[int, int]:
    """By sample: of an update one is long, and another of its group the longest but for it."""
    return {one: {5: LONG, 6: 7}.get(one % num_samples, 3 + one % 4) for one in range(32)}


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
    made.max_new_tokens = forced_lengths(16)
    made.train(resume_from_checkpoint=resume)
    return made


def ppo_run(output_dir: Path, **options: Any) -> Any:
    """Three updates of 8 samples, one of which is long; actor and critic are pipelines over both devices."""
    options = {"num_devices": 2, "total_episodes": 24, "num_ppo_epochs": 1, **options}
    options |= {"adaptive_kl": True, "kl_horizon": 40, "stop_token": "none", "response_length": LONG, "models": MODELS}
    made = tiny.trainer(output_dir, **options)
    made.max_new_tokens = forced_lengths(8)
    made.train()
    return made


def last(trainer: Any) -> dict[str, float]:
    """What the last update logged."""
    logs: dict[str, float] = [entry for entry in trainer.state.log_history if "time/total" in entry][-1]
    return logs


def most_early(trainer: Any) -> float:
    """The largest share of an update that was trained early: of one with few tokens before its last none may be."""
    return max((entry.get("tail/share", 0.0) for entry in trainer.state.log_history), default=0.0)


def test_complete_groups_are_trained_early(tmp_path: Path) -> None:
    early = group_run(tmp_path / "early")
    plain = group_run(tmp_path / "plain", tail_training="off")
    assert most_early(early) > 0
    assert "tail/share" not in last(plain)
    assert tiny.difference(early.model, plain.model) < tiny.ROUNDING
    for name in ("loss", "reward", "grad_norm", "entropy"):
        assert last(early)[name] == pytest.approx(last(plain)[name], rel=1e-3, abs=1e-6)
    assert tiny.difference(early.model, tiny.policy(**MODELS)) > tiny.STEP


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
