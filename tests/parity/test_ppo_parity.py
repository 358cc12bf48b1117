"""fuse's trainer arrives where TRL's does: every metric of every update, and every weight of both models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .cases import BASELINE, CASES, DEEP, Case
from .oracle import Recording
from .replay import PADDED_METRICS, mismatches, replay

Recorded = Callable[[Case], Recording]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_device_in_one_process(case: Case, recorded: Recorded, in_process_workers: None, tmp_path: Path) -> None:
    recording = recorded(case)
    outcome = replay(case, recording, tmp_path, num_devices=1, trl_quirks=case.quirks)
    assert mismatches(recording, outcome) == []


# What is decided of tokens, rewards and advantages is decided before samples are dealt to devices.
BEFORE_DEALING = (
    *("missing_eos_penalty", "past_stop", "k3", "whiten_rewards", "one_epoch"),
    *("pad_is_eos", "pad_in_prompts", "pad_is_sampled", "end_of_pass"),
)


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in BEFORE_DEALING], ids=str)
def test_two_devices(case: Case, recorded: Recorded, pooled_workers: None, tmp_path: Path) -> None:
    recording = recorded(case)
    outcome = replay(case, recording, tmp_path, num_devices=2, trl_quirks=case.quirks)
    assert mismatches(recording, outcome) == []


@pytest.mark.parametrize(
    "options",
    [{"intra_stage_fusion": False}, {"balance_stages": False}, {"actor_stages": 4, "critic_stages": 1}],
    ids=str,
)
def test_however_it_is_scheduled(
    options: dict[str, Any], recorded: Recorded, pooled_workers: None, tmp_path: Path
) -> None:
    recording = recorded(DEEP)
    assert mismatches(recording, replay(DEEP, recording, tmp_path, num_devices=2, trl_quirks=True, **options)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"actor_stages": 4, "critic_stages": 2}, {"train_backend": "megatron", "tensor_parallel_size": 2}],
    ids=str,
)
def test_four_devices(options: dict[str, Any], recorded: Recorded, pooled_workers: None, tmp_path: Path) -> None:
    recording = recorded(DEEP)
    assert mismatches(recording, replay(DEEP, recording, tmp_path, num_devices=4, trl_quirks=True, **options)) == []


def test_one_device_in_other_processes(recorded: Recorded, pooled_workers: None, tmp_path: Path) -> None:
    recording = recorded(BASELINE)
    assert mismatches(recording, replay(BASELINE, recording, tmp_path, num_devices=1)) == []


# What the oracle does in these is a quirk, not a matter of layout.
QUIRKS = ("mini_batches", "end_of_pass", "pad_in_prompts", "ref_adapter")
RAGGED = [case for case in CASES if case.quirks and case.name not in QUIRKS]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_without_padding(case: Case, recorded: Recorded, in_process_workers: None, tmp_path: Path) -> None:
    """The layout of real runs: what is not an average over padding is the oracle's here too."""
    recording = recorded(case)
    outcome = replay(case, recording, tmp_path, num_devices=1)
    assert mismatches(recording, outcome, ignored=PADDED_METRICS) == []
