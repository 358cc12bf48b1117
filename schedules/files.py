"""Files that are kept: where, and written so that nobody reads half of one."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_logger = logging.getLogger(__name__)


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole, however many processes write it at once; makes its directory.

    Raises: OSError when it cannot be written; then nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_writable(directory: Path, option: str) -> None:
    """Raises: ValueError where nothing can be written to `directory`, which `option` names; it is not made."""
    nearest = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {option}={str(directory)!r} ({nearest}: {error.strerror}): name another directory"
        ) from error


@contextmanager
def dispensable(path: Path) -> Iterator[None]:
    """Where the body cannot write `path`, there is a warning instead of an error, once per directory."""
    try:
        yield
    except OSError as error:
        _warn_of(path.parent, error.strerror or str(error))


@cache
def _warn_of(directory: Path, reason: str) -> None:
    _logger.warning("files are not kept in %s: %s", directory, reason)


def user_cache() -> Path:
    """`fuse` under `$XDG_CACHE_HOME`, or under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuse"
