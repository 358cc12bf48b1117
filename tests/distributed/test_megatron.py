"""What `megatron_world.py` measured on a world of two processes: megatron-core stages train as transformers ones do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Mapping[str, float]]]:
    """What each rank found, by check."""
    directory = tmp_path_factory.mktemp("world")
    script = Path(__file__).with_name("megatron_world.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(directory)],
        cwd=script.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    paths = [directory / f"{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in paths), finished.stdout + finished.stderr
    return [json.loads(path.read_text()) for path in paths]


def test_pipelines_in_both_directions_train_as_transformers_stages_do(
    measured: list[Mapping[str, Mapping[str, float]]],
) -> None:
    """Tied embeddings, a value head, clipping and decay included; weights are compared under Hugging Face names."""
    for found in (one["check_pipelines"] for one in measured):
        assert max(found["gradients"], found["norms"], found["weights"]) <= 1e-5, found
        assert found["moved"] > 1e-4, found


def test_matrices_shared_by_two_ranks_train_as_whole_ones_do(
    measured: list[Mapping[str, Mapping[str, float]]],
) -> None:
    """On one stage and two; losses on gathered logits, and on log-probabilities without gathering any."""
    for found in (one["check_tensor_parallel"] for one in measured):
        assert len(found) == 4 * (3 * 2 + 1) * 2
        assert max(found.values()) <= 1e-5, {key: value for key, value in found.items() if value > 1e-5}
