"""Runs whose old log-probabilities the trainer computes anew, through its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuse import GRPOConfig, RLOOTrainer
from fuse.trainers import rollouts

from . import tiny, tiny_group

pytestmark = pytest.mark.usefixtures("pooled_workers")


@pytest.mark.parametrize(("stages", "num_devices"), [(1, 1), (1, 2), (2, 2)])
def test_the_trainers_log_probabilities_are_the_engines_but_for_rounding(
    tmp_path: Path, stages: int, num_devices: int
) -> None:
    """Before the first of several steps on one rollout; what is learnt is the same."""
    options: dict[str, Any] = {"num_devices": num_devices, "actor_stages": stages, "num_iterations": 2, "beta": 0.04}
    options["forward_only"] = False  # within that step: test_forward_only.py
    logs, models = [], []
    for old_logprobs in ("engine", "trainer"):
        trainer = tiny_group.trainer(tmp_path / old_logprobs, old_logprobs=old_logprobs, **options)
        with trainer.updates() as updates:
            for one in updates:
                for sample in one.samples:
                    assert (sample.trainer_logprobs is None) == (old_logprobs == "engine")
                    np.testing.assert_allclose(sample.old_logprobs, sample.logprobs[: sample.length], atol=1e-4)
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        models.append(trainer.model)
    assert tiny.difference(*models) < tiny.ROUNDING
    for engine, own in zip(*logs, strict=True):
        assert own["loss"] == pytest.approx(engine["loss"], abs=1e-4)
        assert own["val/sampler_logprob_diff"] == pytest.approx(engine["val/sampler_logprob_diff"], abs=1e-5)
        assert "time/logprobs" in own
        assert "time/logprobs" not in engine


def test_all_algorithms_learn_from_them(tmp_path: Path) -> None:
    """What the engine tells is off here, and enters neither ratios nor rewards."""
    right = rollouts.Rollouts.roll_out

    def disturbed(self: Any, fleet: Any, samples: Any, *arguments: Any, **options: Any) -> Any:
        recompute = fleet.recompute_logprobs

        def after_a_disturbance(samples: Any) -> None:
            for sample in samples:
                sample.logprobs = [one - 0.3 for one in sample.logprobs]
            recompute(samples)

        fleet.recompute_logprobs = after_a_disturbance
        try:
            return right(self, fleet, samples, *arguments, **options)
        finally:
            del fleet.recompute_logprobs

    # Groups without any reward have gradients of rounding, which Adam would make steps of.
    common: dict[str, Any] = {"num_devices": 2, "num_sample_generations": 0, "adam_epsilon": 1e-4}
    for make, learnt in (
        (tiny.train, "policy_model"),
        (lambda path, **options: tiny_group.train(path, algorithm=RLOOTrainer, beta=0.1, **options), "model"),
    ):
        expected = make(tmp_path / f"{learnt}-engine", **common)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rollouts.Rollouts, "roll_out", disturbed)
            found = make(tmp_path / f"{learnt}-trainer", old_logprobs="trainer", **common)
        assert tiny.difference(getattr(expected, learnt), getattr(found, learnt)) < tiny.ROUNDING
        logged = [entry for entry in found.state.log_history if "val/sampler_logprob_diff" in entry]
        assert logged
        for entry in logged:
            assert entry["val/sampler_logprob_diff"] == pytest.approx(0.3, abs=1e-3)
            assert entry["val/sampler_logprob_diff_max"] == pytest.approx(0.3, abs=1e-3)


def test_samples_are_corrected_over_several_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an engine needed it, which tells what the trainer does: all weights are about 1."""
    monkeypatch.setattr(GRPOConfig, "corrects_sampler", True)
    options: dict[str, Any] = {"num_iterations": 2, "num_devices": 2, "actor_stages": 2}
    trainer = tiny_group.train(tmp_path / "corrected", **options)
    assert trainer.args.recomputes_logprobs
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in logged:
        for bound in ("min", "mean", "max"):
            assert entry[f"sampling/importance_sampling_ratio/{bound}"] == pytest.approx(1, abs=1e-3)
    monkeypatch.undo()
    plain = tiny_group.train(tmp_path / "plain", **options)
    assert not plain.args.recomputes_logprobs
    assert tiny.difference(plain.model, trainer.model) < tiny.ROUNDING


def test_they_are_computed_where_the_loss_needs_them(tmp_path: Path) -> None:
    def recomputes(**options: Any) -> bool:
        return tiny_group.config(tmp_path, **options).recomputes_logprobs

    several = {"num_iterations": 2}
    assert not recomputes()
    assert not recomputes(**several)
    assert recomputes(old_logprobs="trainer", **several)
    assert recomputes(engine="vllm", **several)
    assert not recomputes(engine="vllm", vllm_importance_sampling_correction=False, **several)
    assert not recomputes(engine="vllm"), "the loss has them"
    assert not recomputes(old_logprobs="trainer"), "the loss has them"
    assert tiny.config(tmp_path, old_logprobs="trainer").recomputes_logprobs
    assert not tiny.config(tmp_path).recomputes_logprobs
