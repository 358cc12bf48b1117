"""Checkpoint directories are whole or absent, whatever happens while one is written."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fuse import checkpoint


def _write(output_dir: Path, step: int, content: str = "x") -> None:
    with checkpoint.writing(output_dir, step) as directory:
        (directory / "data").write_text(content)
        checkpoint.RunState(run={"seed": 1}, lr_scheduler={"last_epoch": step}, random_generators={}).save(
            directory / checkpoint.RUN_STATE_NAME
        )


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), checkpoint.writing(tmp_path, 1) as directory:
        (directory / "data").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_the_last_complete_one_is_found_by_number(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        _write(tmp_path, step)
    (tmp_path / "checkpoint-11").mkdir()  # holds no run state: not resumable
    assert checkpoint.find(tmp_path, True).name == "checkpoint-10"
    assert checkpoint.find(tmp_path, str(tmp_path / "checkpoint-9")).name == "checkpoint-9"
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoint.find(tmp_path, str(tmp_path / "checkpoint-11"))
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
    (tmp_path / "checkpoint-1").rename(tmp_path / ".checkpoint-1.4711.old")
    if is_in_place:
        _write(tmp_path, 1, "new")
    (tmp_path / ".checkpoint-2.4711.tmp").mkdir()
    assert (checkpoint.find(tmp_path, True) / "data").read_text() == ("new" if is_in_place else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _write(tmp_path, step)
    checkpoint.rotate(tmp_path, None)
    assert len(checkpoint.complete(tmp_path)) == 3
    checkpoint.rotate(tmp_path, 2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, 1)
    path = tmp_path / "checkpoint-1" / checkpoint.RUN_STATE_NAME
    assert checkpoint.RunState.load(path, {"seed": 1}).lr_scheduler == {"last_epoch": 1}
    with pytest.raises(ValueError, match="written with seed=1, this run has seed=2"):
        checkpoint.RunState.load(path, {"seed": 2})


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(torch.rand(()))

    draw()
    state = checkpoint.RunState(run={}, lr_scheduler={}, random_generators=checkpoint.random_generators())
    state.save(tmp_path / "state.json")
    expected = draw()
    checkpoint.restore_random_generators(checkpoint.RunState.load(tmp_path / "state.json", {}).random_generators)
    assert draw() == expected
