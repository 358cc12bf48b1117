"""How the threads of a process share its cores, with one another and with the devices that it drives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SWITCH_S = 0.5e-3


@contextmanager
def quick_turns() -> Iterator[None]:
    """Threads wait a tenth as long as usual for the one that computes, while the body runs.

    A driver makes reports and writes traces beside what devices do. Whenever it then has to tell devices something, and
    each call lets go of Python's lock, it would be 5 ms until it has that again.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, _SWITCH_S))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def torch_threads(most: int) -> Iterator[None]:
    """The body's own operations on tensors take no more threads than this.

    More than there are idle cores wait for one another: an operation of 0.1 ms then takes up to a third of a second.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)
