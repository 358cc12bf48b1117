"""A run that trains two opposite replicas is the run of one pipeline, and goes on from the checkpoints of either."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fuse import GRPOTrainer
from fuse.driver import stage_choice
from fuse.driver.stage_choice import StageChoice
from fuse.driver.weight_streams import WeightStreams
from fuse.intrastage.measurement_store import Measured
from fuse.intrastage.opposite import has_opposites

from . import tiny, tiny_group

PIPELINE: dict[str, Any] = {"num_devices": 2, "actor_stages": 2, "gradient_accumulation_steps": 3, "max_steps": 4}
"""Of three micro-batches, one replica trains two."""


def logs(trainer: GRPOTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("pooled_workers")
def test_a_run_in_opposite_replicas_is_the_run_of_one_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    num_sent: set[int] = set()
    send = WeightStreams._send

    def count(streams: WeightStreams, models: Any, sent: Any, *arguments: Any) -> Iterator[None]:
        num_sent.add(sum(shape.numel() for shape in sent.shapes.values()))
        return send(streams, models, sent, *arguments)

    plain = tiny_group.train(tmp_path / "plain", bidirectional=False, **PIPELINE)
    monkeypatch.setattr(WeightStreams, "_send", count)
    with caplog.at_level(logging.INFO, logger="fuse"):
        both = tiny_group.train(tmp_path / "both", bidirectional=True, save_strategy="steps", save_steps=2, **PIPELINE)
    assert num_sent == {both.model.num_parameters()}, "weights go to engines once"
    assert tiny.difference(both.model, plain.model) < tiny.ROUNDING
    assert tiny.difference(plain.model, tiny.policy()) > tiny.STEP
    assert [one["grad_norm"] for one in logs(both)] == pytest.approx(
        [one["grad_norm"] for one in logs(plain)], rel=1e-3
    )
    assert all("gain/bidirectional" not in one for one in logs(plain))
    watched, *planned = logs(both)
    assert "gain/bidirectional" not in watched
    assert all("gain/bidirectional" in one and "bubble/serial" in one for one in planned)
    assert "two opposite replicas: a step of 3 micro-batches of actor is planned to take" in caplog.text

    def plain_is_sooner(self: StageChoice, stages: Measured) -> float:
        return 1.0 + has_opposites(stages.placement)

    monkeypatch.setattr(StageChoice, "_step_s", plain_is_sooner)
    resumed = tiny_group.trainer(tmp_path / "both", **PIPELINE)
    with caplog.at_level(logging.INFO, logger=stage_choice.__name__):
        resumed.train(resume_from_checkpoint=str(tmp_path / "both" / "checkpoint-2"))
    assert (
        "plain 1F1B: a step of 3 micro-batches of actor should take 2.000 s by two opposite replicas, 1.000 s by"
        in caplog.text
    )
    assert tiny.difference(resumed.model, both.model) < tiny.ROUNDING
