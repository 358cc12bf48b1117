"""Cores are claimed: by this process twice, as by two runs."""

from __future__ import annotations

import os

import pytest

from fuse.workers import cores
from fuse.workers.cores import claimed_cores


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runs on this machine claim cores, too: these are others."""
    monkeypatch.setattr(cores, "_NAME", f"fuse test {os.getpid()} core")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 9})


def test_runs_beside_each_other_take_different_cores_while_there_are_any() -> None:
    with claimed_cores(2) as first, claimed_cores(1) as second:
        assert (first, second) == ([0, 1], [2])
        with claimed_cores(2) as third:
            assert third == [0, 1], "all are taken"
    with claimed_cores(2) as again:
        assert again == [0, 1], "claims end"


def test_free_cores_come_first() -> None:
    with claimed_cores(1), claimed_cores(3) as cores_of_another:
        assert cores_of_another == [1, 2, 0]


def test_more_devices_than_cores_share_them() -> None:
    with claimed_cores(4) as shared:
        assert shared == [0, 1, 2, 0]
