"""Engines over several devices: what cannot be is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fuse import PPOConfig
from fuse.config.generation import check_generation

from ..tiny_models import config

ACTOR = config("llama", num_attention_heads=6, hidden_size=48)


@pytest.mark.parametrize(
    ("options", "num_devices", "line"),
    [
        ({"engine": "transformers"}, 4, r"with engine='transformers', whose matrices are whole: set engine='vllm'"),
        ({}, 3, "does not divide num_devices=3: choose a divisor"),
        ({"generation_tensor_parallel_size": 4}, 8, "does not divide the policy's 6 attention heads"),
        ({"kv_transfer": "nixl"}, 4, "with kv_transfer='nixl', though the KV .*leave kv_transfer out"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path: Path, options: dict[str, Any], num_devices: int, line: str) -> None:
    given = {"engine": "vllm", "generation_tensor_parallel_size": 2} | options
    with pytest.raises(ValueError, match=f"^generation_tensor_parallel_size=[24] {line}") as error:
        check_generation(PPOConfig(output_dir=str(tmp_path), **given), num_devices, ACTOR)
    assert "\n" not in str(error.value)


def test_one_device_per_engine_needs_no_more(tmp_path: Path) -> None:
    check_generation(PPOConfig(output_dir=str(tmp_path), engine="transformers"), 3, ACTOR)
    check_generation(PPOConfig(output_dir=str(tmp_path), engine="vllm", generation_tensor_parallel_size=3), 6, ACTOR)
