"""What `megatron_world.py` measured on a world of two processes: megatron-core stages train as transformers ones do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from .conftest import Measured

PROGRAM = "megatron_world"
pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def directory(measured_by: Measured) -> Path:
    return measured_by(PROGRAM)


@pytest.fixture(scope="module")
def measured(directory: Path) -> list[Mapping[str, Mapping[str, float]]]:
    """What each rank found, by check."""
    return [json.loads((directory / f"two-{rank}.json").read_text()) for rank in range(2)]


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
        assert len(found) == 5 * (2 + 4 + 2 + 2)
        halves = {key: value for key, value in found.items() if key.endswith("halves")}
        # W adds a head's gradient after I did that of the embedding it is tied to, and a whole backward before.
        assert max(halves.values()) <= 1e-6, halves
        assert all(value == 0 for key, value in halves.items() if not key.startswith("qwen2 tied, 1")), halves
        assert max(found.values()) <= 1e-5, {key: value for key, value in found.items() if value > 1e-5}


def test_shared_bfloat16_matrices_come_close_to_whole_float32_ones(
    measured: list[Mapping[str, Mapping[str, float]]],
) -> None:
    for found in (one["check_bfloat16"] for one in measured):
        assert min(found.values()) > 0.99, found


def test_a_lost_peer_ends_in_an_error_that_names_rank_and_stage(directory: Path) -> None:
    errors = json.loads((directory / "lost-0.json").read_text())
    assert "rank 0: summing input gradients of a layer that ranks share failed" in errors["backward"]
    assert (
        "rank 0: summing hidden states over the ranks that share stage 0 of LlamaForCausalLM failed"
        in (errors["forward"])
    )
