"""The oracle's runs, computed once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from .cases import Case
from .oracle import Recording, record


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Recording]:
    return cache(lambda case: record(case, tmp_path_factory.mktemp(f"oracle-{case.name}")))
