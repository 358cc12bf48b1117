"""fuse's trainers without a critic arrive where TRL's do: every metric of every step, and every weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from .group_cases import CASES, GroupCase
from .group_oracle import GroupRecording, record
from .group_replay import mismatches, replay

Recorded = Callable[[GroupCase], GroupRecording]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return cache(lambda case: record(case, tmp_path_factory.mktemp(f"oracle-{case.name}")))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_device(case: GroupCase, recorded: Recorded, in_process_workers: None, tmp_path: Path) -> None:
    recording = recorded(case)
    assert mismatches(recording, replay(case, recording, tmp_path, num_devices=1)) == []
