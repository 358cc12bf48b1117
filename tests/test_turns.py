"""Threads' turns are quick while a run lasts, and as they were after it."""

from __future__ import annotations

import sys

import pytest

from fuse.turns import quick_turns


def test_turns_are_quick_within_and_as_before_after() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(KeyError), quick_turns():
        assert sys.getswitchinterval() == pytest.approx(5e-4, rel=0.02)
        with quick_turns():
            assert sys.getswitchinterval() == pytest.approx(5e-4, rel=0.02)
        assert sys.getswitchinterval() == pytest.approx(5e-4, rel=0.02)
        raise KeyError
    assert sys.getswitchinterval() == before


def test_quicker_turns_stay() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with quick_turns():
            assert sys.getswitchinterval() == pytest.approx(1e-4, rel=0.02)
    finally:
        sys.setswitchinterval(before)
