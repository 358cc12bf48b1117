"""How many traces stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fuse.trainers.run import _delete_oldest


@pytest.mark.parametrize(
    ("most", "left"), [(0, [1, 2, 3, 9]), (1, [3]), (2, [2, 3]), (4, [1, 2, 3, 9]), (9, [1, 2, 3, 9])]
)
def test_the_oldest_are_deleted_whatever_their_numbers(tmp_path: Path, most: int, left: list[int]) -> None:
    """Number 9 is of an earlier run."""
    for second, step in enumerate((9, 1, 2, 3)):
        path = tmp_path / f"iteration-{step:05d}.json"
        path.touch()
        os.utime(path, (second, second))
    (tmp_path / "notes.json").touch()
    _delete_oldest(tmp_path / "iteration-00003.json", most)
    names = {f"iteration-{step:05d}.json" for step in left}
    assert {path.name for path in tmp_path.iterdir()} == names | {"notes.json"}
