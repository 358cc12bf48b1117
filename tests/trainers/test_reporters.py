"""A resumed run is one run to whoever metrics are reported to."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, TrainerControl

from fuse.trainers.reporters import continue_reports, named_for, reported_to


def test_tensorboard_goes_on_in_its_directory_after_the_checkpoint(tmp_path: Path) -> None:
    """Interrupted after two updates, of which one is saved; resumed, and one more."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")

    def report(steps: dict[int, float], kept: dict[str, str], resumed: int) -> dict[str, str]:
        handler: Any = CallbackHandler([TensorBoardCallback()], None, None, None, None)
        continue_reports(handler, kept, resumed)
        handler.on_train_begin(args, TrainerState(), TrainerControl())
        for step, value in steps.items():
            handler.on_log(args, TrainerState(global_step=step), TrainerControl(), {"reward": value})
        handler.on_train_end(args, TrainerState(), TrainerControl())
        return reported_to(handler)

    kept = report({1: 0.1, 2: 0.2}, {}, 0)
    assert report({2: 0.5, 3: 0.3}, kept, 1) == kept
    read = EventAccumulator(kept["tensorboard"], purge_orphaned_data=True).Reload()
    assert [(one.step, round(one.value, 3)) for one in read.Scalars("train/reward")] == [(1, 0.1), (2, 0.5), (3, 0.3)]


def test_a_directory_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    handler: Any = CallbackHandler([TensorBoardCallback()], None, None, None, None)
    continue_reports(handler, {"tensorboard": str(tmp_path / "gone")}, 1)
    assert reported_to(handler) == {}


def test_names_stay_with_a_run_and_users_names_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setenv("WANDB_RESUME", "must")
    args = SimpleNamespace(run_name=None, report_to=["trackio"], output_dir="/x/out")
    with named_for("0123456789abcdef", args):
        assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_RESUME"]) == ("0123456789abcdef", "must")
        assert args.run_name == "out-01234567"
    assert "WANDB_RUN_ID" not in os.environ
    assert (os.environ["WANDB_RESUME"], args.run_name) == ("must", None)
    args.run_name = "mine"
    with named_for("0123456789abcdef", args):
        assert args.run_name == "mine"
