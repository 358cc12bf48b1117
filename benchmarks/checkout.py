"""Which state of the source a figure was measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path

_HERE = Path(__file__).resolve()


def describe_checkout(file: Path = _HERE) -> dict[str, object]:
    """commit: of the checkout that tracks this file; dirty: whether files that git tracks differ from it.

    Both are None for an installed package, and where there is no git.
    """
    directory = file.parent
    commit = _git(directory, "rev-parse", "HEAD") if _git(directory, "ls-files", file.name) else None
    if commit is None:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(_git(directory, "status", "--porcelain", "--untracked-files=no"))}


def _git(directory: Path, *arguments: str) -> str | None:
    """What a command of git prints; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
