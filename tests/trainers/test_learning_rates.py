"""Roles on one schedule, each from its own rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fuse.trainers.learning_rates import (
    learning_rate_schedule,
    learning_rates,
    logged_rates,
    restore_learning_rates,
)

from . import tiny

ROLES = ("actor", "critic")


def after(directory: Path, num_steps: int, **options: Any) -> Any:
    """The configuration, and its schedule of 4 steps after so many."""
    config = tiny.config(directory, learning_rate=1.0, **options)
    optimizer, schedule = learning_rate_schedule(config, nn.Linear(1, 1), 4)
    for _ in range(num_steps):
        optimizer.step()
        schedule.step()
    return config, schedule


def test_all_have_the_common_rate(tmp_path: Path) -> None:
    config, schedule = after(tmp_path, 1)
    assert learning_rates(config, schedule, ROLES) == {"actor": 0.75, "critic": 0.75}
    assert logged_rates(config, schedule, "lr") == {"lr": 0.75}


def test_the_critic_has_its_own_on_the_same_schedule(tmp_path: Path) -> None:
    config, schedule = after(tmp_path, 1, critic_learning_rate=8.0)
    assert learning_rates(config, schedule, ROLES) == {"actor": 0.75, "critic": 6.0}
    assert logged_rates(config, schedule, "lr") == {"lr": 0.75, "lr/critic": 6.0}


@pytest.mark.parametrize("critic", [None, 8.0])
def test_a_schedule_is_restored_and_only_one_of_the_same_rates(critic: float | None, tmp_path: Path) -> None:
    _, saved = after(tmp_path, 2, critic_learning_rate=critic)
    config, same = after(tmp_path, 0, critic_learning_rate=critic)
    restore_learning_rates(same, saved.state_dict(), Path("checkpoint-2"))
    assert learning_rates(config, same, ROLES) == {"actor": 0.5, "critic": 0.5 if critic is None else 4.0}
    _, other = after(tmp_path, 0, critic_learning_rate=8.0 if critic is None else None)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 was written with (no|a) critic_learning_rate, and this run has"
    ):
        restore_learning_rates(other, saved.state_dict(), Path("checkpoint-2"))
