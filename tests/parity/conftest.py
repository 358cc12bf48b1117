"""The oracle's runs, computed once per session, and workers inside this process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from . import in_process
from .cases import Case
from .oracle import Recording, record


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Recording]:
    return cache(lambda case: record(case, tmp_path_factory.mktemp(f"oracle-{case.name}")))


@pytest.fixture
def in_process_workers(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of one device run inside this process."""
    in_process.use(monkeypatch)
