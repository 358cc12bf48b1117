"""How the threads of a process share its cores, with one another and with the devices that it drives."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch

_Number = TypeVar("_Number", int, float)

_SWITCH_S = 0.5e-3


def quick_turns() -> AbstractContextManager[None]:
    """Threads wait a tenth as long as usual for the one that computes, while the body runs.

    A driver makes reports and writes traces beside what devices do. Whenever it then has to tell devices something, and
    each call lets go of Python's lock, it would be 5 ms until it has that again.
    """
    return _at_most(_SWITCH_S, sys.getswitchinterval, sys.setswitchinterval)


def torch_threads(most: int) -> AbstractContextManager[None]:
    """The body's own operations on tensors take no more threads than this.

    More than there are idle cores wait for one another: an operation of 0.1 ms then takes up to a third of a second.
    """
    return _at_most(most, torch.get_num_threads, torch.set_num_threads)


@contextmanager
def _at_most(most: _Number, get: Callable[[], _Number], change: Callable[[_Number], None]) -> Iterator[None]:
    before = get()
    change(min(before, most))
    try:
        yield
    finally:
        change(before)
