"""What a resumed run is told of options that have changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fuse import PPOConfig
from fuse.config.differences import MAY_DIFFER, differences, kept_options


def options(**changes: Any) -> dict[str, Any]:
    return kept_options(PPOConfig(**{"output_dir": "out", "use_cpu": True} | changes))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"learning_rate": 1e-4, "kl_coef": 0.1}, ["learning_rate 3e-06 -> 0.0001", "kl_coef 0.05 -> 0.1"]),
        ({"stop_token": "eos"}, ["stop_token None -> eos"]),
        ({"lr_scheduler_type": "cosine"}, ["lr_scheduler_type linear -> cosine"]),
        ({"output_dir": "elsewhere", "num_devices": 7, "save_strategy": "no", "report_to": "none"}, []),
        ({"resume_from_checkpoint": "true", "logging_steps": 3, "trace_steps": 9, "hub_token": "secret"}, []),
    ],
)
def test_what_changes_learning_is_named(changes: dict[str, Any], lines: list[str]) -> None:
    assert sorted(differences(options(), options(**changes))) == sorted(lines)


def test_a_checkpoint_that_kept_no_options_tells_no_change() -> None:
    assert differences({}, options()) == []


def test_every_exception_is_an_option() -> None:
    assert {field.name for field in dataclasses.fields(PPOConfig)} >= MAY_DIFFER


def test_no_secret_is_kept(tmp_path: Path) -> None:
    assert "secret" not in str(options(hub_token="secret"))
