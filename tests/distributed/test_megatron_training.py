"""What `megatron_training_world.py` measured: Megatron models train, are saved and resume alike on every layout.

Its models: Llama, Qwen2 with tied embeddings, Qwen3 and a Llama with a value head, all at once on the same devices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

NUM_DEVICES = {"one": 1, "pipeline": 2, "tensor": 2, "both": 4, "replicas": 4}
NUM_STATE_TENSORS = 3 * (30 + 38 + 36 + 30)
"""Parameters and two moments of the four models: three layers of 9, 12 and 11 weights, and embedding, norm and head."""
Measured = Mapping[str, list[dict[str, Any]]]


def measure(directory: Path, *layouts: str) -> Measured:
    """What each device found, by layout."""
    script = Path(__file__).with_name("megatron_training_world.py")
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(directory), *layouts],
        cwd=script.parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    paths = {name: [directory / f"{name}-{device}.json" for device in range(NUM_DEVICES[name])] for name in layouts}
    assert all(path.exists() for own in paths.values() for path in own), finished.stdout + finished.stderr
    return {name: [json.loads(path.read_text()) for path in own] for name, own in paths.items()}


def assert_trained(measured: Measured) -> None:
    """Three clipped and decayed steps by random schedules with halved backwards, against transformers stages."""
    for found in (found for layout in measured.values() for found in layout):
        assert found["norms"] <= 1e-6, found
        assert found["weights"] <= 1e-6, found
        assert found["moved"] > 1e-4, found
        assert found["clipped"] > 2, found
        assert found["steps"] == 3, found


def assert_resumed(measured: Measured) -> None:
    """The step after a resume on the same layout, bit for bit; what other layouts saved, loaded bit for bit."""
    for number, layout in enumerate(measured.values()):
        assert all(found["resumed"] == found["loaded"] == 0 for found in layout), layout
        # A pipeline's ends both load a tied embedding.
        assert number * NUM_STATE_TENSORS <= sum(found["num_loaded"] for found in layout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return measure(tmp_path_factory.mktemp("world"), "pipeline", "tensor", "one")


def test_steps_on_a_pipeline_and_on_shared_matrices_are_those_of_transformers_stages(measured: Measured) -> None:
    assert_trained(measured)


def test_a_training_state_resumes_on_its_layout_and_loads_on_others(measured: Measured) -> None:
    assert_resumed(measured)
    # Of the devices that share a stage one writes all of it, and the others hold no copy of that.
    assert [found["num_loaded"] for found in measured["tensor"]] == [NUM_STATE_TENSORS, 0]


def test_what_devices_have_whole_beside_shards_stays_the_same_on_all(measured: Measured) -> None:
    first, second = measured["tensor"]
    assert first["copies"] == second["copies"]


@pytest.mark.slow
def test_pipelines_and_replicas_of_shared_matrices_do_all_this_too(tmp_path: Path) -> None:
    measured = measure(tmp_path, "tensor", "both", "replicas")
    assert_trained(measured)
    assert_resumed(measured)
    assert len({found["copies"] for found in measured["both"]}) == 2  # a stage's
    assert len({found["copies"] for found in measured["replicas"]}) == 1
