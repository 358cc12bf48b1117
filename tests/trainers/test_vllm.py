"""A run with the vLLM engine is the run with the transformers engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from ..worker_pool import WorkerPool
from . import tiny


def _train(output_dir: Path, **options: Any) -> tuple[dict[str, torch.Tensor], list[str], list[dict[str, float]]]:
    """Two updates: the weights afterwards, every response, and what was logged."""
    responses: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], target: list[int]) -> list[float]:
        responses.append(completions)
        return tiny.count_a(prompts, completions, target)

    trainer = tiny.train(output_dir, reward=reward, models={"head_dim": 32}, num_sample_generations=0, **options)
    in_order = sorted(one for completions in responses for one in completions)
    return trainer.policy_model.state_dict(), in_order, trainer.state.log_history


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_run_with_vllm_ends_where_the_run_with_transformers_does(tmp_path: Path, worker_pool: WorkerPool) -> None:
    with worker_pool.in_use():
        weights, responses, log = _train(tmp_path / "transformers")
    vllm_weights, vllm_responses, vllm_log = _train(tmp_path / "vllm", engine="vllm", generation_cache_bytes=1 << 22)
    assert vllm_responses == responses
    for name, tensor in weights.items():
        torch.testing.assert_close(vllm_weights[name], tensor, rtol=0, atol=1e-5)
    assert [row["objective/kl"] for row in vllm_log] == pytest.approx([row["objective/kl"] for row in log], abs=1e-4)


def test_a_missing_package_is_reported_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"needs vLLM 0\.32, which is not installed"):
        tiny.trainer(tmp_path, engine="vllm")
