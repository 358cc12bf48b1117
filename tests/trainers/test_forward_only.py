"""A run whose steps score what their loss needs is the run that scores it first; what cannot be so is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuse import GRPOTrainer, RLOOTrainer
from fuse.driver import stage_by_stage

from . import tiny, tiny_group

OPTIONS: dict[str, Any] = {
    "num_devices": 2,
    "actor_stages": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "max_steps": 6,
    "beta": 0.1,
    "old_logprobs": "trainer",
    "scoring": "sharded",
    "inter_stage_fusion": False,
    "bidirectional": False,
}
"""Three updates of two steps: the first shows what training costs, the second what the reference does."""


def logs(trainer: GRPOTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.usefixtures("pooled_workers")
def test_a_run_that_scores_within_steps_is_the_run_that_scores_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scored: list[tuple[str, ...]] = []
    score_through = stage_by_stage.score_through

    def count(workers: Any, roles: Any, *arguments: Any) -> Any:
        scored.append(tuple(roles))
        return score_through(workers, roles, *arguments)

    monkeypatch.setattr(stage_by_stage, "score_through", count)
    first = tiny_group.train(tmp_path / "first", forward_only=False, **OPTIONS)
    assert scored == [("reference",), ("actor",)] * 3
    scored.clear()
    with caplog.at_level(logging.INFO, logger="fuse"):
        within = tiny_group.trainer(tmp_path / "within", **OPTIONS)
        with within.updates() as updates:
            for one in updates:
                for sample in one.samples:
                    assert sample.trainer_logprobs is not None
                    assert sample.reference_logprobs is not None
                    np.testing.assert_allclose(sample.trainer_logprobs, sample.logprobs[: sample.length], atol=1e-4)
                    assert not np.array_equal(sample.reference_logprobs, sample.trainer_logprobs) or one.update == 2
    assert scored == [("reference",)], "before models are placed"
    assert tiny.difference(within.model, first.model) < tiny.ROUNDING
    assert tiny.difference(first.model, tiny.policy()) > tiny.STEP
    for name in ("loss", "kl", "grad_norm", "clip_ratio/region_mean"):
        found, expected = ([one[name] for one in logs(trainer)] for trainer in (within, first))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert all("time/logprobs" not in one and one["val/sampler_logprob_diff"] < 1e-5 for one in logs(within))
    assert all("gain/forward_only" not in one for one in (*logs(first), *logs(within)[:2]))
    assert logs(within)[2]["gain/forward_only"] > 0
    assert "old_logprobs, reference_logprobs within training: a step of " in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": RLOOTrainer, "beta": 0.05, "num_iterations": 2},  # the reward has the penalty
        {"scoring": "whole", "steps_per_generation": 2},  # copies have no pipeline, and all is on policy
        {"actor_stages": 1},
        {"intra_stage_fusion": False},
    ],
)
def test_what_cannot_be_scored_within_steps_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"forward_only=True with .* nothing can be scored within training"):
        tiny_group.trainer(tmp_path, forward_only=True, **(OPTIONS | options))


def test_a_reference_scores_beside_generation_unless_it_is_asked_not_to(tmp_path: Path) -> None:
    beside = tiny_group.trainer(tmp_path, **(OPTIONS | {"inter_stage_fusion": True}))
    assert beside._settings.late == {"old_logprobs"}
    asked = tiny_group.trainer(tmp_path, forward_only=True, **(OPTIONS | {"inter_stage_fusion": True}))
    assert asked._settings.late == {"old_logprobs", "reference_logprobs"}
    penalised = {"beta": 0.05, "num_iterations": 2, "algorithm": RLOOTrainer}
    assert tiny_group.trainer(tmp_path, **(OPTIONS | penalised))._settings.late == frozenset()
    assert tiny_group.trainer(tmp_path, **(OPTIONS | penalised | {"beta": 0.0}))._settings.late == {"old_logprobs"}
