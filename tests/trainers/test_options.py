"""Options that transformers and TRL know do here what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuse import PPOTrainer
from fuse.trainers import face

from . import tiny


def test_max_steps_ends_a_run(tmp_path: Path, pooled_workers: None) -> None:
    trainer = tiny.train(tmp_path, max_steps=1, num_sample_generations=0)
    assert (trainer.state.global_step, trainer.state.max_steps, trainer.state.episode) == (1, 1, 8)


@pytest.mark.parametrize(
    ("max_steps", "total_episodes", "num_updates"), [(1, 16, 1), (9, 16, 2), (9, None, 9), (-1, None, 6)]
)
def test_max_steps_is_the_most_updates_and_replaces_passes(
    max_steps: int, total_episodes: int | None, num_updates: int, tmp_path: Path
) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=max_steps, total_episodes=total_episodes, num_train_epochs=3)
    assert trainer.args.num_total_batches == num_updates
    assert trainer.args.total_episodes == 8 * num_updates


def test_completions_are_shown_as_often_as_evaluation_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooled_workers: None
) -> None:
    shown: list[int] = []
    monkeypatch.setattr(PPOTrainer, "generate_completions", lambda self, sampling: shown.append(self.state.global_step))
    options: dict[str, Any] = {"total_episodes": 40, "eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3}
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.rows(8), num_sample_generations=0, num_ppo_epochs=1, **options)
    trainer.train()
    assert shown == [4, 5], "every second update from the third on, and the last, as in transformers"


@pytest.mark.parametrize("push", [False, True])
def test_what_is_saved_is_pushed_where_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, push: bool) -> None:
    pushed: list[tuple[str, Any]] = []
    monkeypatch.setattr(face, "push_policy", lambda name, *_, **options: pushed.append((name, options)))
    place = {"hub_token": "secret", "hub_private_repo": True, "hub_revision": "trial"}
    tiny.trainer(tmp_path, push_to_hub=push, hub_model_id="me/it", **place).save_model()
    options = {"commit_message": "Model save", "token": "secret", "private": True, "revision": "trial"}
    assert pushed == ([("me/it", options)] if push else [])
