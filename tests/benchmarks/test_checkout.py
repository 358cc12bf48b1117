"""Which state of the source a figure was measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fuse.benchmarks.checkout import describe_checkout


@pytest.mark.processes
def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text("1\n")
    assert describe_checkout(source) == {"commit": None, "dirty": None}
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "source.py"], [*identity, "commit", "-qm", "One"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    described = describe_checkout(source)
    assert len(str(described["commit"])) == 40
    assert described["dirty"] is False
    (tmp_path / "other.py").write_text("untracked\n")
    assert describe_checkout(source) == described
    assert describe_checkout(tmp_path / "other.py") == {"commit": None, "dirty": None}, "installed inside a checkout"
    source.write_text("2\n")
    assert describe_checkout(source) == described | {"dirty": True}
