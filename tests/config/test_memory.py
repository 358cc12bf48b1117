"""A run that memory cannot hold is refused where it is made, in one line with bytes and the remedy."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fuse.config import memory
from fuse.config.ppo import PPOConfig
from fuse.intrastage.cost_profile import Shape

from ..trainers import tiny


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


@pytest.mark.usefixtures("on_gpus")
def test_a_device_is_shared_in_time_where_it_must_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First engines sleep, then training is offloaded, too; `off` refuses, `on` does not ask."""
    fits = {(False, False): False, (True, False): False, (False, True): False, (True, True): False}
    asked: list[tuple[bool, bool]] = []

    def made_up(setup: Any, **_: Any) -> Any:
        asked.append((setup.engines_sleep, setup.offloads_training))
        planned = real_ledger(replace(setup, device_memory_bytes=10**12 if fits[asked[-1]] else 10**9))
        assert planned.fits == fits[asked[-1]]
        return planned

    real_ledger = memory.ledger
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 10**12)
    monkeypatch.setattr(memory, "ledger", made_up)
    with pytest.raises(ValueError, match="the run does not fit"):
        tiny.trainer(tmp_path, num_devices=2)
    assert asked == [(False, False), (True, False), (False, True), (True, True)]
    fits[True, False] = True
    settings: Any = tiny.trainer(tmp_path, num_devices=2)._settings
    assert (settings.engines_sleep, settings.offloads_training) == (True, False)
    with pytest.raises(ValueError, match="the run does not fit"):
        tiny.trainer(tmp_path, num_devices=2, engines_sleep="off")
    fits[True, True] = True
    settings = tiny.trainer(tmp_path, num_devices=2, offload_training="on")._settings
    assert (settings.engines_sleep, settings.offloads_training) == (True, True)


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_cores_are_not_shared_in_time_unless_asked(tmp_path: Path, asked: str) -> None:
    settings: Any = tiny.trainer(tmp_path, engines_sleep=asked, offload_training=asked)._settings
    assert (settings.engines_sleep, settings.offloads_training) == (False, False)
