"""What lives as long as a run is not looked through for garbage meanwhile, and is again afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from fuse import garbage
from fuse.garbage import set_apart


class Circle:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """As the heap of a process is that has set nothing apart."""
    gc.unfreeze()
    garbage._has_frozen_objects.cache_clear()
    yield
    gc.freeze()
    garbage._has_frozen_objects.cache_clear()


def test_garbage_of_before_waits_for_the_end() -> None:
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


def test_what_others_have_set_apart_stays_so() -> None:
    gc.freeze()
    with set_apart():
        pass
    assert gc.get_freeze_count() > 0
