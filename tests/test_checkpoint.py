"""Checkpoint directories are whole or absent, whatever happens while one is written."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fuse import checkpoint, run_state
from fuse.run_state import RunState

_CLOCK = itertools.count(1)


def _write(output_dir: Path, step: int, content: str = "x", *, run_id: str = "a", only_model: bool = False) -> Path:
    """Every checkpoint is a second later than the last."""
    with checkpoint.writing(output_dir, step) as directory:
        (directory / "data").write_text(content)
        if not only_model:
            (directory / checkpoint.WORKER_STATE_NAME).mkdir()
        RunState(
            run_id=run_id,
            saved_s=float(next(_CLOCK)),
            run={"seed": 1},
            lr_scheduler={"last_epoch": step},
            random_generators={},
        ).save(directory / checkpoint.RUN_STATE_NAME)
    return output_dir / f"checkpoint-{step}"


def _names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), checkpoint.writing(tmp_path, 1) as directory:
        (directory / "data").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_the_last_complete_one_is_found(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        _write(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # holds no run state: not resumable
    _write(tmp_path, 12, only_model=True)
    assert checkpoint.find(tmp_path, True).name == "checkpoint-10"
    assert checkpoint.find(tmp_path, str(tmp_path / "checkpoint-9")).name == "checkpoint-9"
    for step, part in ((11, "run_state.json"), (12, "state")):
        with pytest.raises(ValueError, match=rf"not a complete checkpoint \(no {part}\)"):
            checkpoint.find(tmp_path, str(tmp_path / f"checkpoint-{step}"))
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        checkpoint.find(tmp_path / "elsewhere", True)


def test_an_earlier_runs_checkpoint_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path, 1, "old")
    _write(tmp_path, 1, "new")
    assert (tmp_path / "checkpoint-1" / "data").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("is_in_place", [False, True])
def test_what_a_killed_writer_left_is_tidied_up(tmp_path: Path, is_in_place: bool) -> None:
    """Killed between the two renames by which a checkpoint is replaced, or behind them; and once in the middle."""
    _write(tmp_path, 1, "old")
    aside = tmp_path / ".checkpoint-1.k1lled.tmp"
    aside.mkdir()
    (tmp_path / "checkpoint-1").rename(aside / "replaced")
    if is_in_place:
        _write(tmp_path, 1, "new")
    (tmp_path / ".checkpoint-2.k1lled.tmp" / "checkpoint-2").mkdir(parents=True)
    assert (_started(tmp_path, True) / "data").read_text() == ("new" if is_in_place else "old")
    assert _names(tmp_path) == ["checkpoint-1"]


def _started(output_dir: Path, resume_from: str | bool) -> Path:
    found = checkpoint.start(output_dir, resume_from)
    assert found is not None
    return found


@pytest.mark.parametrize("resume_from", [None, "{}/checkpoint-1"])
def test_every_start_tidies_up(tmp_path: Path, resume_from: str | None) -> None:
    _write(tmp_path, 1)
    (tmp_path / ".checkpoint-2.k1lled.tmp").mkdir()
    checkpoint.start(tmp_path, resume_from and resume_from.format(tmp_path))
    assert _names(tmp_path) == ["checkpoint-1"]


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    with checkpoint.writing(tmp_path, 1) as directory:
        (directory / "data").write_text("x")
        checkpoint.start(tmp_path, None)
    assert (tmp_path / "checkpoint-1" / "data").exists()


def test_a_process_id_that_comes_back_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container every run may be process 7; it was killed while it saved, and nobody has tidied up."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    (tmp_path / ".checkpoint-1.7.tmp").mkdir()
    _write(tmp_path, 1)
    assert (tmp_path / "checkpoint-1" / "data").exists()


def test_others_may_read_a_checkpoint_as_far_as_they_may_read_its_directory(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert _write(tmp_path, 1).stat().st_mode == (tmp_path / "made").stat().st_mode


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        written = _write(tmp_path, step)
    for keep in (None, 0, 3, 4):
        checkpoint.rotate(tmp_path, keep, written)
        assert len(_names(tmp_path)) == 3
    checkpoint.rotate(tmp_path, 2, written)
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_rotation_counts_models_alone_too(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.rotate(tmp_path, 1, _write(tmp_path, step, only_model=True))
    assert _names(tmp_path) == ["checkpoint-2"]


def test_rotation_leaves_other_runs_alone_and_what_was_just_written(tmp_path: Path) -> None:
    _write(tmp_path, 100, run_id="earlier")
    (tmp_path / "checkpoint-200").mkdir()  # of another program
    for step in (10, 20):
        checkpoint.rotate(tmp_path, 1, _write(tmp_path, step, run_id="mine"))
    assert _names(tmp_path) == ["checkpoint-100", "checkpoint-20", "checkpoint-200"]


def test_a_run_that_went_back_goes_on_from_there(tmp_path: Path) -> None:
    """Resumed from its checkpoint-5 though there was a checkpoint-10: what it saves then is the last."""
    for step in (5, 10, 6):
        written = _write(tmp_path, step)
    assert checkpoint.find(tmp_path, True) == written
    checkpoint.rotate(tmp_path, 1, written)
    assert _names(tmp_path) == ["checkpoint-6"]


def test_the_latest_run_is_resumed_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, 100, run_id="earlier")
    _write(tmp_path, 10, run_id="mine")
    assert _started(tmp_path, True).name == "checkpoint-10"
    (line,) = caplog.messages
    assert "resuming from checkpoint-10" in line
    assert "not from checkpoint-100" in line


def test_one_runs_checkpoints_are_resumed_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, 1)
    _write(tmp_path, 2)
    assert _started(tmp_path, True).name == "checkpoint-2"
    assert not caplog.messages


def test_a_fresh_start_says_what_lies_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint.start(tmp_path, None) is None
    assert not caplog.messages
    for step in range(1, 8):
        _write(tmp_path, step)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.start(tmp_path, None) is None
    (line,) = caplog.messages
    assert "checkpoint-1, checkpoint-2, checkpoint-3, checkpoint-4, checkpoint-5 and 2 more of other runs" in line


@pytest.mark.parametrize("text", ["true", "True"])
def test_true_may_be_written(tmp_path: Path, text: str) -> None:
    _write(tmp_path, 1)
    assert _started(tmp_path, text) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("text", ["false", "False", "", False, None])
def test_so_may_false(tmp_path: Path, text: str | bool | None) -> None:
    _write(tmp_path, 1)
    assert checkpoint.start(tmp_path, text) is None


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path: Path) -> None:
    _write(tmp_path, 1, "old")
    message = r"cannot save .*checkpoint-1: .*No space left on device"
    with pytest.raises(checkpoint.SaveError, match=message), checkpoint.writing(tmp_path, 1):
        raise OSError(errno.ENOSPC, "No space left on device", "file")
    assert _names(tmp_path) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "data").read_text() == "old"


def test_a_rename_that_fails_brings_back_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, 1, "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "checkpoint-1" and path.parent != tmp_path:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(checkpoint.SaveError, match="quota"):
        _write(tmp_path, 1, "new")
    assert (tmp_path / "checkpoint-1" / "data").read_text() == "old"
    assert _names(tmp_path) == ["checkpoint-1"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("x")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), checkpoint.saving(tmp_path):
        raise error


def test_what_libraries_raise_for_a_full_disk_is_one_too(tmp_path: Path) -> None:
    class SafetensorError(Exception):
        pass

    with pytest.raises(checkpoint.SaveError, match="No space left"), checkpoint.saving(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_run_state_is_named(tmp_path: Path, text: str) -> None:
    path = _write(tmp_path, 1) / checkpoint.RUN_STATE_NAME
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*run_state\.json .*resume from another checkpoint"):
        RunState.load(path, {})
    with pytest.raises(ValueError, match=r"no checkpoint to resume from .*checkpoint-1 cannot be resumed"):
        checkpoint.find(tmp_path, True)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / checkpoint.RUN_STATE_NAME
    assert RunState.load(path, {"seed": 1}).lr_scheduler == {"last_epoch": 1}
    with pytest.raises(ValueError, match="written with seed=1, this run has seed=2"):
        RunState.load(path, {"seed": 2})


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    draw()
    state = RunState(run_id="a", saved_s=1.0, run={}, lr_scheduler={}, random_generators=run_state.random_generators())
    state.save(tmp_path / "state.json")
    expected = draw()
    run_state.restore_random_generators(RunState.load(tmp_path / "state.json", {}).random_generators)
    assert draw() == expected


def test_a_run_that_resumes_elsewhere_tidies_what_killed_runs_left(tmp_path: Path) -> None:
    """Of the checkpoint to resume from, too, if it was being replaced."""
    before, after = tmp_path / "before", tmp_path / "after"
    _write(before, 1)
    (before / ".checkpoint-2.abc.tmp" / "checkpoint-2").mkdir(parents=True)
    replaced = before / ".checkpoint-1.abc.tmp"
    replaced.mkdir()
    (before / "checkpoint-1").rename(replaced / "replaced")
    assert checkpoint.start(after, str(before / "checkpoint-1")) == before / "checkpoint-1"
    assert _names(before) == ["checkpoint-1"]


def test_a_run_state_without_options_is_read(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    path = _write(tmp_path, 1) / checkpoint.RUN_STATE_NAME
    content = json.loads(path.read_text())
    del content["options"]
    path.write_text(json.dumps(content))
    assert RunState.read(path).options == {}
