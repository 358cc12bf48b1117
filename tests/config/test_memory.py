"""A run that memory cannot hold is refused where it is made, in one line with bytes and the remedy."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fuse.config import memory
from fuse.config.grpo import GRPOConfig
from fuse.config.ppo import PPOConfig
from fuse.driver import memory as memory_ledger
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
    options: dict[str, Any] = {"scoring": "whole"}
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: certain)
    tiny.trainer(tmp_path / "two", **options)
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: certain - 1)
    with pytest.raises(ValueError, match=f"take {certain} bytes and this machine has {certain - 1}: use smaller"):
        tiny.trainer(tmp_path / "three", **options)


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
    whole: dict[str, Any] = {"num_devices": 2, "scoring": "whole"}
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
        tiny.trainer(tmp_path, **whole)
    assert asked == [(False, False), (True, False), (False, True), (True, True)]
    fits[True, False] = True
    settings: Any = tiny.trainer(tmp_path, **whole)._settings
    assert (settings.engines_sleep, settings.offloads_training) == (True, False)
    with pytest.raises(ValueError, match="the run does not fit"):
        tiny.trainer(tmp_path, **whole, engines_sleep="off")
    fits[True, True] = True
    settings = tiny.trainer(tmp_path, **whole, offload_training="on")._settings
    assert (settings.engines_sleep, settings.offloads_training) == (True, True)


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_cores_are_not_shared_in_time_unless_asked(tmp_path: Path, asked: str) -> None:
    settings: Any = tiny.trainer(tmp_path, engines_sleep=asked, offload_training=asked)._settings
    assert (settings.engines_sleep, settings.offloads_training) == (False, False)


@pytest.mark.usefixtures("on_gpus")
def test_models_score_in_shares_where_whole_copies_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the ledger: the bytes that whole copies need just fit, and with one less they do not."""
    alone: dict[str, Any] = {"engines_sleep": "off", "offload_training": "off", "models": {"vocab_size": 1 << 16}}
    monkeypatch.setattr(memory_ledger, "COMMUNICATOR_BYTES", 0)  # one more is more than these models are
    needed: dict[str, int] = {}
    for scoring in ("whole", "sharded"):
        monkeypatch.setattr(memory, "device_memory_bytes", lambda: 8 * 10**9)
        made: Any = tiny.trainer(tmp_path / scoring, num_devices=2, scoring=scoring, **alone)
        setup = made._settings.memory
        assert setup.scoring == scoring
        assert made._settings.scoring.is_sharded == (scoring == "sharded")
        planned = ledger(setup, plans_fusion=False)
        reserve = memory_ledger.RESERVE_SHARE * setup.device_memory_bytes
        needed[scoring] = round((max(planned.peak_bytes.values()) - reserve) / (1 - memory_ledger.RESERVE_SHARE))
    assert needed["sharded"] < needed["whole"]

    def chosen(memory_bytes: int, **options: Any) -> str:
        monkeypatch.setattr(memory, "device_memory_bytes", lambda: memory_bytes)
        made: Any = tiny.trainer(tmp_path / "auto", num_devices=2, **alone, **options)
        assert made._settings.scoring.is_sharded == (made._settings.memory.scoring == "sharded")
        scoring: str = made._settings.memory.scoring
        return scoring

    assert chosen(needed["whole"] + 1000) == "whole"
    assert chosen(needed["whole"] - 1000) == chosen(needed["sharded"] + 1000) == "sharded"
    with pytest.raises(ValueError, match=r"does not fit with whole scoring: .* bytes .*, scoring='sharded'"):
        chosen(needed["whole"] - 1000, scoring="whole")
    with pytest.raises(ValueError, match=r"does not fit with sharded scoring: device \d would hold \d+ bytes"):
        chosen(needed["sharded"] - 1000)


@pytest.mark.usefixtures("on_gpus")
def test_stages_are_cut_by_size_where_even_ones_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not measured, then: what that would favour need not fit."""
    asked: list[bool] = []

    def made_up(setup: Any, **options: Any) -> Any:
        asked.append(any(replica.layer_ranges for replica in setup.placement))
        return real_ledger(replace(setup, device_memory_bytes=10**12 if asked[-1] else 10**9), **options)

    real_ledger = memory.ledger
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: 10**12)
    monkeypatch.setattr(memory, "ledger", made_up)
    models = {"vocab_size": 1 << 12, "num_hidden_layers": 6}
    with caplog.at_level(logging.INFO, logger=memory.__name__):
        trainer: Any = tiny.trainer(tmp_path, models=models, num_devices=2, scoring="whole", engines_sleep="on")
    assert asked == [False, False, True], "as it is, with training offloaded, and cut by size"
    assert "stages are cut by size: memory has no room for even ones" in caplog.text
    settings = trainer._settings
    assert settings.placement == settings.memory.placement
    assert settings.balance is None


def test_on_cpus_only_a_critics_copy_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = tiny.trainer(tmp_path / "one")
    actor, critic, reference = (
        sum(parameter.numel() for parameter in model.parameters()) for model in made._models.values()
    )
    whole = 8 * (actor + critic + reference) + 16 * (actor + critic)
    assert not made._settings.scoring.is_sharded
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: whole - 4 * critic)
    made = tiny.trainer(tmp_path / "two")
    assert made._settings.scoring.is_sharded
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: whole - 4 * critic - 1)
    with pytest.raises(ValueError, match=f"take {whole - 4 * critic} bytes"):
        tiny.trainer(tmp_path / "three")


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


def test_a_run_of_one_update_measures_nothing_beforehand(tmp_path: Path) -> None:
    trainer: Any = tiny_group.trainer(tmp_path, num_devices=2, actor_stages=2)
    several, one = trainer._settings.for_updates(2), trainer._settings.for_updates(1)
    assert several.balance is not None
    assert several.alternative is not None
    assert one.balance is None
    assert one.alternative is None


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
