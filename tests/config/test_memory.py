"""A run that memory cannot hold is refused where it is made, in one line with bytes and the remedy."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fuse.config import memory
from fuse.config.grpo import GRPOConfig
from fuse.config.ppo import PPOConfig
from fuse.driver.memory import RESERVE_SHARE, ledger
from fuse.intrastage.cost_profile import Shape
from fuse.intrastage.opposite import with_opposites
from fuse.trainers import device_memory

from ..trainers import tiny, tiny_group


def test_a_machine_that_is_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[int] = []
    trainer = tiny.trainer(tmp_path / "one")
    for model in trainer._models.values():
        needed.append(sum(parameter.numel() for parameter in model.parameters()))
    actor, critic, reference = needed
    certain = 8 * (actor + critic + reference) + 16 * (actor + critic)
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: certain)
    tiny.trainer(tmp_path / "two")
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: certain - 1)
    with pytest.raises(ValueError, match=f"take {certain} bytes and this machine has {certain - 1}: use smaller"):
        tiny.trainer(tmp_path / "three")


def test_this_machine_has_memory() -> None:
    assert memory.host_memory_bytes() > 1 << 28


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were some: nothing is started by making a trainer."""
    monkeypatch.setattr(PPOConfig, "accelerator", property(lambda _: "cuda"))


@pytest.mark.usefixtures("on_gpus")
def test_gpus_that_are_too_small_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 8 * 10**9)
    trainer: Any = tiny.trainer(tmp_path / "one", num_devices=2)
    setup = trainer._settings.memory
    assert setup.placement == trainer._settings.placement
    assert set(setup.models) == {"actor", "critic", "reference"}
    assert trainer._settings.plan.longest == setup.longest == Shape(2, 2 + 8)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 10**9)
    line = r"device \d would hold \d+ bytes in \w+ and has 1000000000 \(most of it: device contexts .* GB.*\): use more"
    with pytest.raises(ValueError, match=line):
        tiny.trainer(tmp_path / "two", num_devices=2)


@pytest.mark.usefixtures("on_gpus")
def test_a_model_that_cannot_be_measured_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unmeasurable(*_: object, **__: object) -> object:
        raise ValueError("memory of M cannot be foreseen")

    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(memory, "planned_models", unmeasurable)
    with caplog.at_level(logging.WARNING, logger=memory.__name__):
        trainer: Any = tiny.trainer(tmp_path, num_devices=2)
    assert "memory is not planned: memory of M cannot be foreseen" in caplog.text
    assert trainer._settings.memory is None


def test_opposite_replicas_are_an_alternative_where_this_machine_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"num_devices": 2, "actor_stages": 2}

    def settings_of(name: str, **more: Any) -> Any:
        trainer: Any = tiny_group.trainer(tmp_path / name, **options, **more)
        return trainer._settings

    count = tiny.policy().num_parameters()
    plain, both = 8 * count + 16 * count, 8 * count + 32 * count
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: both)
    settings = settings_of("enough")
    assert settings.alternative == with_opposites(settings.placement)
    assert settings.plan.fused
    assert settings_of("asked", bidirectional=True).placement == settings.alternative
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: both - 1)
    with caplog.at_level(logging.INFO, logger=memory.__name__):
        assert settings_of("too little").alternative is None
    assert "plain 1F1B: memory has no room for two opposite replicas" in caplog.text
    with pytest.raises(ValueError, match=rf"take {both} bytes .* leave bidirectional out, use smaller"):
        settings_of("asked all the same", bidirectional=True)
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: plain)
    assert settings_of("left out", bidirectional=False).alternative is None


def test_opposite_replicas_are_an_alternative_where_gpus_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GRPOConfig, "accelerator", property(lambda _: "cuda"))
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 8 * 10**9)
    monkeypatch.setattr(device_memory, "device_memory_bytes", lambda: 8 * 10**9)
    options: dict[str, Any] = {"num_devices": 2, "actor_stages": 2}
    roomy: Any = tiny_group.trainer(tmp_path / "roomy", **options)
    assert roomy._settings.alternative is not None
    setup = roomy._settings.memory
    peaks = [
        max(ledger(replace(setup, placement=one), plans_fusion=False).peak_bytes.values())
        for one in (roomy._settings.placement, roomy._settings.alternative)
    ]
    between = round(sum(peaks) / 2 - RESERVE_SHARE * 8 * 10**9)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: round(between / (1 - RESERVE_SHARE)))
    tight: Any = tiny_group.trainer(tmp_path / "tight", **options)
    assert tight._settings.alternative is None


@pytest.mark.parametrize(
    "options",
    [
        {"num_devices": 1},
        {"num_devices": 2, "actor_stages": 1},
        {"num_devices": 2, "actor_stages": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 1},
        {"num_devices": 2, "intra_stage_fusion": False},
    ],
)
def test_opposite_replicas_that_cannot_be_are_refused_when_asked_for(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bidirectional=True with .* leave bidirectional out"):
        tiny_group.trainer(tmp_path / "asked", bidirectional=True, **options)
    trainer: Any = tiny_group.trainer(tmp_path / "left open", **options)
    assert trainer._settings.alternative is None


def test_whole_replicas_stay_the_default_where_they_fit(tmp_path: Path) -> None:
    whole: Any = tiny_group.trainer(tmp_path / "whole", num_devices=2)
    assert [replica.ranks for replica in whole._settings.placement] == [(0,), (1,)]
    assert whole._settings.alternative is None
    asked: Any = tiny_group.trainer(tmp_path / "asked", num_devices=2, bidirectional=True)
    assert [replica.ranks for replica in asked._settings.placement] == [(0, 1), (1, 0)]
    evenly: Any = tiny_group.trainer(tmp_path / "evenly", num_devices=2, actor_stages=2, balance_stages=False)
    assert evenly._settings.alternative is None, "nothing is measured that could tell"
