"""Runs and their checkpoints: whose they are, which stay, and what happens where they cannot be written."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fuse.checkpoint import SaveError
from fuse.trainers import run
from fuse.workers.calls import Future
from fuse.workers.model_handle import ModelHandle

from . import tiny

pytestmark = pytest.mark.usefixtures("pooled_workers")

SAVING = {"save_strategy": "steps", "save_steps": 1, "num_sample_generations": 0, "trace_steps": 0}


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir() if "checkpoint" in path.name)


def test_a_run_rotates_and_resumes_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.train(tmp_path, total_episodes=24, save_total_limit=1, **SAVING)
    assert names(tmp_path) == ["checkpoint-3"]
    (tmp_path / "checkpoint-3").rename(tmp_path / "checkpoint-100")

    second = tiny.train(tmp_path, total_episodes=8, save_total_limit=1, **SAVING)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-100"]
    assert second.how_to_resume == f"checkpoint-1 is in {tmp_path}, to go on with by resume_from_checkpoint=True"
    assert "holds checkpoint-100 of other runs" in caplog.text

    resumed = tiny.trainer(tmp_path, total_episodes=16, save_total_limit=1, **SAVING)
    resumed.train(resume_from_checkpoint="true")
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-2"], "checkpoint-1 was the same run's"
    assert "resuming from checkpoint-1, of the run that saved last" in caplog.text
    assert resumed.state.log_history[0] == second.state.log_history[0]


class Counter(TrainerCallback, ExportableState):
    """Remembers how many updates it has seen, as transformers' stateful callbacks do."""

    def __init__(self, unit: str = "updates") -> None:
        self.unit, self.seen = unit, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"unit": self.unit}, "attributes": {"seen": self.seen}}


@pytest.mark.parametrize("restores", [True, False])
def test_stateful_callbacks_remember_where_asked_to(restores: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"restore_callback_states_from_checkpoint": restores, **SAVING}
    first = [Counter("steps"), Counter("rounds")]
    first[1].seen = 10
    tiny.train(tmp_path, total_episodes=16, callbacks=first, **options)
    resumed = tiny.trainer(tmp_path, total_episodes=24, callbacks=[Counter(), Counter()], **options)
    resumed.train(resume_from_checkpoint=True)
    counters = [one for one in resumed.callback_handler.callbacks if isinstance(one, Counter)]
    expected = [("steps", 3), ("rounds", 13)] if restores else [("updates", 1), ("updates", 1)]
    assert [(one.unit, one.seen) for one in counters] == expected


def test_models_alone_are_rotated(tmp_path: Path) -> None:
    trainer = tiny.train(tmp_path, save_total_limit=1, save_only_model=True, **SAVING)
    assert trainer.how_to_resume == "nothing was saved to resume from"
    assert names(tmp_path) == ["checkpoint-2"]
    with pytest.raises(ValueError, match=r"no checkpoint to resume from .*checkpoint-2 cannot be resumed without"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_training_state_that_is_written_elsewhere_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on hosts that do not share the directory."""
    tiny.train(tmp_path / "out", total_episodes=8, **SAVING)
    save = ModelHandle.save

    def save_elsewhere(handle: ModelHandle, directory: Path, mixed: Sequence[str]) -> Future[dict[str, int]]:
        return save(handle, tmp_path / "elsewhere", mixed)

    monkeypatch.setattr(ModelHandle, "save", save_elsewhere)
    resumed = tiny.trainer(tmp_path / "out", num_devices=2, **SAVING)
    with pytest.raises(
        SaveError, match=r"cannot save .*checkpoint-2: the training state of rank 0 is not in"
    ) as caught:
        resumed.train(resume_from_checkpoint=True)
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "out") == ["checkpoint-1"]


def test_a_relative_output_dir_is_the_drivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Workers are in another current directory. What the resumed run does otherwise is told."""
    monkeypatch.chdir(tmp_path)
    tiny.train(Path("out"), total_episodes=8, **SAVING)
    assert names(tmp_path / "out") == ["checkpoint-1"]
    changed: dict[str, Any] = {**SAVING, "kl_coef": 0.2, "save_total_limit": 5}
    tiny.trainer(Path("out"), **changed).train(resume_from_checkpoint="out/checkpoint-1")
    (line,) = (line for line in caplog.messages if "other options" in line)
    assert line.endswith("checkpoint-1 was written with other options: total_episodes 8 -> 16, kl_coef 0.05 -> 0.2")
    assert names(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


def test_what_a_worker_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = ModelHandle.save

    def save_badly(handle: ModelHandle, directory: Path, mixed: Sequence[str]) -> Future[dict[str, int]]:
        directory.write_text("a file in its place")
        return save(handle, directory, mixed)

    monkeypatch.setattr(ModelHandle, "save", save_badly)
    with pytest.raises(SaveError, match=r"cannot save .*checkpoint-1: model worker on device 0 failed: .*state"):
        tiny.train(tmp_path, **SAVING)
    assert names(tmp_path) == []


def test_traces_that_cannot_be_written_are_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "write_chrome_trace", full)
    monkeypatch.setattr(run.update_log, "append", full)
    with caplog.at_level(logging.WARNING):
        trained = tiny.train(tmp_path, num_sample_generations=0)
    assert trained.state.global_step == 2
    for directory in (tmp_path, tmp_path / "traces"):
        assert caplog.text.count(f"files are not kept in {directory}: No space left on device") == 1


def test_other_failures_to_write_traces_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("a span without a name")

    monkeypatch.setattr(run, "write_chrome_trace", broken)
    with pytest.raises(KeyError, match="a span without a name"):
        tiny.train(tmp_path, num_sample_generations=0)


def test_a_model_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot save .*file"):
        tiny.trainer(tmp_path).save_model(str(tmp_path / "file"))
