"""Whole copies and pipelines on worlds of processes: the same scores to the bit, and the same runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import TrainerCallback

from fuse.sample import Sample, SampleState
from fuse.workers.errors import WorkerError

from ..trainers import tiny

pytestmark = pytest.mark.usefixtures("pooled_workers")

OPTIONS: dict[str, Any] = {"total_episodes": 16, "num_sample_generations": 0, "trace_steps": 0, "num_micro_batches": 1}


def generated(count: int = 24) -> list[Sample]:
    """Samples that are to be scored, of lengths that differ."""
    generator = np.random.default_rng(0)
    samples = []
    for index in range(count):
        prompt, response = (generator.integers(2, 16, int(generator.integers(1, 9))).tolist() for _ in range(2))
        sample = Sample(index, tuple(prompt), response_ids=response, logprobs=[0.0] * len(response))
        sample.length = len(response)
        for state in (SampleState.GENERATING, SampleState.GENERATED):
            sample.advance(state)
        samples.append(sample)
    return samples


def scored(tmp_path: Path, scoring: str, num_devices: int, **options: Any) -> list[Sample]:
    """And, where the reference's are, the log-probabilities of the actor, which it is a copy of."""
    trainer = tiny.trainer(
        tmp_path / f"{scoring}-{num_devices}",
        reward=tiny.scorer(5, num_hidden_layers=4),
        num_devices=num_devices,
        models={"num_hidden_layers": 4},
        scoring=scoring,
        **OPTIONS,
        **options,
    )
    samples = generated()
    with trainer._workers(None) as fleet:
        assert fleet.settings.scoring.is_sharded == (scoring == "sharded")
        fleet.infer(samples)
        fleet.recompute_logprobs(samples)
        fleet.drain_spans()
    return samples


@pytest.mark.parametrize("num_devices", [2, 4])
def test_scores_have_the_bits_of_whole_copies(tmp_path: Path, num_devices: int) -> None:
    whole, sharded = (scored(tmp_path, scoring, num_devices) for scoring in ("whole", "sharded"))
    for one, other in zip(whole, sharded, strict=True):
        assert one.state is other.state is SampleState.SCORED
        assert one.score == other.score
        for name in ("reference_logprobs", "values", "trainer_logprobs"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert len(one.values) == one.length + 1  # type: ignore[arg-type]
        np.testing.assert_allclose(one.trainer_logprobs, one.reference_logprobs, atol=1e-5)  # type: ignore[arg-type]


def test_runs_are_the_same(tmp_path: Path) -> None:
    """Stage by stage to the bit; fused, micro-batches of scoring differ, and with them rounding."""
    options = {"reward": tiny.scorer(5), "num_devices": 2, **OPTIONS, "total_episodes": 24}
    whole = tiny.train(tmp_path / "whole", scoring="whole", inter_stage_fusion=False, **options)
    sharded = tiny.train(tmp_path / "sharded", scoring="sharded", inter_stage_fusion=False, **options)
    assert tiny.difference(whole.policy_model, sharded.policy_model) == 0.0
    assert tiny.difference(whole.value_model, sharded.value_model) == 0.0
    for policy in ("adaptive", "threshold", "none"):
        fused = tiny.train(tmp_path / policy, scoring="sharded", migration_policy=policy, **options)
        assert tiny.difference(whole.policy_model, fused.policy_model) < tiny.ROUNDING
        assert tiny.difference(whole.value_model, fused.value_model) < tiny.ROUNDING


def test_replicas_score_in_turn(tmp_path: Path) -> None:
    options = {"num_devices": 4, "actor_stages": 1, "critic_stages": 2, **OPTIONS}
    whole = tiny.train(tmp_path / "whole", scoring="whole", inter_stage_fusion=False, **options)
    sharded = tiny.train(tmp_path / "sharded", scoring="sharded", inter_stage_fusion=False, **options)
    assert tiny.difference(whole.policy_model, sharded.policy_model) == 0.0
    assert tiny.difference(whole.value_model, sharded.value_model) == 0.0


def test_megatron_stages_score_what_they_train(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_devices": 2, "models": {"num_key_value_heads": 2}, **OPTIONS}
    whole = tiny.train(tmp_path / "whole", scoring="whole", **options)
    shared = tiny.train(
        tmp_path / "shared",
        scoring="sharded",
        old_logprobs="trainer",
        train_backend="megatron",
        tensor_parallel_size=2,
        **options,
    )
    assert tiny.difference(whole.policy_model, shared.policy_model) < tiny.ROUNDING
    assert tiny.difference(whole.value_model, shared.value_model) < tiny.ROUNDING


def test_a_dead_worker_ends_the_run(tmp_path: Path) -> None:
    """While pieces are under way: the others wait for its messages, and are told."""
    trainer = tiny.trainer(tmp_path, scoring="sharded", num_devices=2, worker_timeout_s=300.0, **OPTIONS)

    class KillAWorker(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert trainer._fleet is not None
            os.kill(trainer._fleet._model_workers[1].worker.process_id, signal.SIGKILL)

    trainer.add_callback(KillAWorker())
    with pytest.raises(WorkerError, match=r"model worker on device \d failed: "):
        trainer.train()
