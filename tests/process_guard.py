"""Has a test fail that starts a process without its marker: what `make check` leaves out is found by markers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"})
_INCIDENTAL = frozenset({"fc-list", "uname"})
"""What libraries ask once and remember: matplotlib for fonts, `platform` for the processor."""

_guarded: str | None = None
"""The test that may start none."""


def _refuse(how: str) -> None:
    if _guarded is not None:
        pytest.fail(f"{_guarded} starts a process ({how}): mark it with pytest.mark.processes")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _STARTS and not (event == "subprocess.Popen" and arguments[0] in _INCIDENTAL):
        _refuse(event)


def _start(process: BaseProcess) -> None:
    _refuse("multiprocessing")
    _unguarded_start(process)


# An audit hook stays for good, and so does this; multiprocessing starts most of its processes past what is audited.
sys.addaudithook(_audit)
_unguarded_start = BaseProcess.start
BaseProcess.start = _start  # type: ignore[method-assign]


@contextmanager
def guarded(test: str | None) -> Iterator[None]:
    """Nothing in the block starts a process in the name of this test; None: it may."""
    global _guarded
    before, _guarded = _guarded, test
    try:
        yield
    finally:
        _guarded = before
