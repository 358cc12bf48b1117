"""Files that can be done without."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from schedules.files import dispensable, write_whole


def test_a_file_that_cannot_be_written_is_one_warning_per_directory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    for name in ("one", "two"):
        with dispensable(tmp_path / "file" / name):
            write_whole(tmp_path / "file" / name, "text")
    with dispensable(tmp_path / "full" / "one"):
        raise OSError(errno.ENOSPC, "No space left on device")
    in_the_way, full = caplog.messages
    assert in_the_way.startswith(f"files are not kept in {tmp_path / 'file'}: ")
    assert full == f"files are not kept in {tmp_path / 'full'}: No space left on device"


def test_other_errors_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), dispensable(tmp_path / "file"):
        raise ValueError("a bug")
