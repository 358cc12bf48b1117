"""What lives as long as a run is not looked through for garbage meanwhile, and is again afterwards. Also a program.

In processes of their own: to look through all that a session of tests holds takes seconds.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from fuse.garbage import set_apart


class Circle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.own = self


def garbage_of_before_waits_for_the_end() -> None:
    circle = Circle()
    before = weakref.ref(circle)
    with set_apart():
        del circle
        within = weakref.ref(Circle())
        gc.collect()
        assert within() is None
        assert before() is not None
    gc.collect()
    assert before() is None


def what_others_have_set_apart_stays_so() -> None:
    gc.freeze()
    with set_apart():
        pass
    assert gc.get_freeze_count() > 0


def garbage_is_looked_for_rarely_until_the_end() -> None:
    gc.set_threshold(500, 5, 5)
    with set_apart():
        assert gc.get_threshold()[0] > 500
    assert gc.get_threshold() == (500, 5, 5)


CHECKS = {
    check.__name__: check
    for check in (
        garbage_of_before_waits_for_the_end,
        what_others_have_set_apart_stays_so,
        garbage_is_looked_for_rarely_until_the_end,
    )
}


@pytest.mark.processes
@pytest.mark.parametrize("check", CHECKS)
def test_garbage(check: str) -> None:
    subprocess.run([sys.executable, "-m", __name__, check], cwd=Path(__file__).parents[1], check=True)


if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
