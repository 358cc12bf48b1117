"""Whole runs in which the planner has more micro-batches trained than were drawn, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fuse import GRPOTrainer
from fuse.intrastage import training_planner

from . import tiny, tiny_group


def operations(output_dir: Path, update: int) -> set[str]:
    """Of training, as an update's trace names them."""
    trace = json.loads((output_dir / "traces" / f"iteration-{update:05}.json").read_text())
    return {event["name"] for event in trace["traceEvents"] if event.get("cat") == "train"}


@pytest.mark.usefixtures("pooled_workers")
def test_more_and_smaller_micro_batches_train_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drawn = tiny.train(tmp_path / "drawn", num_micro_batches=1)
    asked: list[Any] = []

    def twice(works: Any, *_: Any, **options: Any) -> float:
        asked.append(options)
        return 2.0

    monkeypatch.setattr(training_planner, "soonest", twice)
    for name, fused in (("fused", True), ("serial", False)):
        more = tiny.train(tmp_path / name, num_devices=2, intra_stage_fusion=fused, balance_stages=False)
        assert {"F actor.0.5", "F critic.1.5"} <= operations(tmp_path / name, 1), "two of four in two pieces each"
        assert "F actor.0.6" not in operations(tmp_path / name, 1)
        assert {"F actor.0.7", "F critic.1.7"} <= operations(tmp_path / name, 2)
        assert tiny.difference(more.policy_model, drawn.policy_model) < tiny.ROUNDING
        assert tiny.difference(more.value_model, drawn.value_model) < tiny.ROUNDING
        for row, other in zip(more.state.log_history, drawn.state.log_history, strict=True):
            for metric in ("loss/policy_avg", "loss/value_avg", "val/ratio_var", "grad_norm/actor"):
                assert row[metric] == pytest.approx(other[metric], rel=1e-3, abs=1e-5), metric
    assert [one["least_tokens"] for one in asked] == [one["least_tokens"] for one in asked[:1]] * 2
    assert all(one["gap_s"] > 0 for one in asked)

    eight = tiny.train(tmp_path / "asked for", num_micro_batches=8)
    assert "F actor.0.7" in operations(tmp_path / "asked for", 1)
    assert len(asked) == 2, "nothing is chosen where a number is asked for"
    assert tiny.difference(eight.policy_model, drawn.policy_model) < tiny.ROUNDING


@pytest.mark.parametrize("options", [{"regroup_micro_batches": False}, {"trl_quirks": True}])
def test_a_number_is_refused_where_micro_batches_are_not_dealt(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_micro_batches=8, but micro-batches are trained as they are drawn"):
        tiny.trainer(tmp_path, num_micro_batches=8, **options)


def test_a_number_is_refused_beside_a_quantile_of_a_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_entropy_quantile below 1: leave one of them out"):
        tiny_group.trainer(tmp_path, algorithm=GRPOTrainer, num_micro_batches=8, top_entropy_quantile=0.5)


def test_a_number_is_chosen_for_pipelines_alone(tmp_path: Path) -> None:
    chosen = {
        (num_devices, number): tiny.trainer(
            tmp_path, num_devices=num_devices, num_micro_batches=number
        )._settings.plan.chooses_number
        for num_devices in (1, 2)
        for number in (None, 3)
    }
    assert [key for key, is_chosen in chosen.items() if is_chosen] == [(2, None)]
