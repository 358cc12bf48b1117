"""Training on megatron-core stages arrives where TRL does, be the devices a pipeline or share each matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from .cases import Case
from .oracle import Recording
from .replay import mismatches, replay

TIED = Case(name="tied_and_grouped", options={"stop_token": "eos"}, tie_word_embeddings=True, num_key_value_heads=2)
LAYOUTS: Mapping[str, Mapping[str, object]] = {
    "pipelines, fused": {},
    "pipelines, one after the other": {"intra_stage_fusion": False},
    "shared matrices": {"tensor_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_devices(layout: str, recorded: Callable[[Case], Recording], pooled_workers: None, tmp_path: Path) -> None:
    recording = recorded(TIED)
    outcome = replay(
        TIED, recording, tmp_path, num_devices=2, trl_quirks=True, train_backend="megatron", **LAYOUTS[layout]
    )
    assert mismatches(recording, outcome) == []
