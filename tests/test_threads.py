"""Threads' turns are quick while a run lasts, and torch has few of them; afterwards all is as it was."""

from __future__ import annotations

import sys

import pytest
import torch

from fuse.threads import quick_turns, torch_threads


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


def test_torch_has_no_more_threads_than_it_may_and_no_more_than_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), torch_threads(2):
            assert torch.get_num_threads() == 2
            with torch_threads(5):
                assert torch.get_num_threads() == 2
            raise KeyError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
