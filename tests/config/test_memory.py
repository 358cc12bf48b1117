"""A run that memory cannot hold is refused where it is made, in one line with bytes and the remedy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fuse.config import memory
from fuse.config.ppo import PPOConfig
from fuse.intrastage.cost_profile import Shape

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


def test_a_reference_that_is_mixed_is_each_devices_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, in which small moves are not rounded away."""
    options: dict[str, Any] = {"beta": 0.1, "num_devices": 2, "model": tiny.policy().bfloat16()}
    needed = []
    for follows in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "host_memory_bytes", lambda: 0)
            with pytest.raises(ValueError, match="the run does not fit") as error:
                tiny_group.trainer(tmp_path / str(follows), sync_ref_model=follows, **options)
        needed.append(int(str(error.value).split(" take ")[1].split()[0]))
    size = sum(parameter.numel() for parameter in options["model"].parameters())
    assert needed[1] - needed[0] == 2 * 4 * size
    for follows, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        trainer: Any = tiny_group.trainer(tmp_path / str(follows), sync_ref_model=follows, **options)
        assert trainer._settings.spec("reference", trainer.ref_model).dtype == dtype
