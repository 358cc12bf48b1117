"""fuse's trainer arrives where TRL's does: every metric of every update, and every weight of both models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .cases import BASELINE, CASES, Case
from .oracle import Recording
from .replay import PADDED_METRICS, mismatches, replay

Recorded = Callable[[Case], Recording]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_device_in_one_process(case: Case, recorded: Recorded, in_process_workers: None, tmp_path: Path) -> None:
    recording = recorded(case)
    outcome = replay(case, recording, tmp_path, num_devices=1, trl_quirks=case.quirks)
    assert mismatches(recording, outcome) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_devices(case: Case, recorded: Recorded, pooled_workers: None, tmp_path: Path) -> None:
    recording = recorded(case)
    outcome = replay(case, recording, tmp_path, num_devices=2, trl_quirks=case.quirks)
    assert mismatches(recording, outcome) == []


@pytest.mark.parametrize("num_devices", [1, 2])
def test_processes_of_their_own(num_devices: int, recorded: Recorded, ray_cluster: None, tmp_path: Path) -> None:
    recording = recorded(BASELINE)
    outcome = replay(BASELINE, recording, tmp_path, num_devices=num_devices)
    assert mismatches(recording, outcome) == []


# What the oracle does in these is a quirk, not a matter of layout.
QUIRKS = ("mini_batches", "end_of_pass", "pad_in_prompts")
RAGGED = [case for case in CASES if case.quirks and case.name not in QUIRKS]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_without_padding(case: Case, recorded: Recorded, in_process_workers: None, tmp_path: Path) -> None:
    """The layout of real runs: what is not an average over padding is the oracle's here too."""
    recording = recorded(case)
    outcome = replay(case, recording, tmp_path, num_devices=1)
    assert mismatches(recording, outcome, ignored=PADDED_METRICS) == []
