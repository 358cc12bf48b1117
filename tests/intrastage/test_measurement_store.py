"""Measurements are found again by the run, and by others of the same models; what cannot be used is measured anew."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fuse.intrastage.cost_profile import Profile, Shape, StageCosts
from fuse.intrastage.measurement_store import NAME, Measured, MeasurementStore
from fuse.intrastage.placement import Replica

PLACEMENT = (Replica("actor", 0, (0, 1), ((0, 3), (3, 4))), Replica("critic", 0, (1, 0)))
COSTS = StageCosts(
    pipeline="actor.0",
    stage=0,
    shape=Shape(2, 8),
    forward_ticks=1,
    backward_ticks=2,
    input_grad_ticks=1,
    weight_grad_ticks=1,
    activation_bytes=0,
    weight_grad_bytes=0,
)
MEASURED = Measured(PLACEMENT, Profile(tick_s=1e-5, stages=(COSTS,), transfers=()))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_run_and_others_of_the_same_models_find_it(tmp_path: Path) -> None:
    assert MeasurementStore(tmp_path / "a", {"model": 1}).load() is None
    MeasurementStore(tmp_path / "a", {"model": 1}).save(MEASURED)
    assert MeasurementStore(tmp_path / "a", {"model": 1}).load() == MEASURED
    assert MeasurementStore(tmp_path / "b", {"model": 1}).load() == MEASURED, "from the cache"
    assert MeasurementStore(tmp_path / "a", {"model": 2}).load() is None
    unfused = Measured(PLACEMENT, None, MEASURED)
    MeasurementStore(tmp_path / "a", {"model": 1}).save(unfused)
    assert MeasurementStore(tmp_path / "a", {"model": 1}).load() == unfused
    MeasurementStore(tmp_path / "a", {"model": 1}).save(Measured(PLACEMENT, None))
    assert MeasurementStore(tmp_path / "b", {"model": 1}).load() == Measured(PLACEMENT, None)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": {"model": 1}, "placement": [1], "profile": null}'])
def test_damaged_files_are_passed_over_with_a_warning(
    tmp_path: Path, cache: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = MeasurementStore(tmp_path / "a", {"model": 1})
    store.save(MEASURED)
    (tmp_path / "a" / NAME).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert store.load() == MEASURED, "the cache still has it"
    assert "measuring again" in caplog.messages[0]


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").write_text("a file, not a folder")
    MeasurementStore(tmp_path / "a", {"model": 1}).save(MEASURED)
    assert "not kept" in caplog.messages[0]
    assert json.loads(next((tmp_path / "cache").rglob("*.json")).read_text())["identity"] == {"model": 1}
