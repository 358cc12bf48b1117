"""What `megatron_training_world.py` measured: Megatron models train, are saved and resume alike on every layout.

Its models: Llama, Qwen2 with tied embeddings, Qwen3 and a Llama with a value head, all at once on the same devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from .conftest import Measured as MeasuredBy

PROGRAM = "megatron_training_world"
NUM_DEVICES = {"pipeline": 2, "tensor": 2, "one": 1, "both": 4, "replicas": 4}
NUM_STATE_TENSORS = 3 * (30 + 38 + 36 + 30)
"""Parameters and two moments of the four models: three layers of 9, 12 and 11 weights, and embedding, norm and head."""
Measured = Mapping[str, list[dict[str, Any]]]


pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def measured(measured_by: MeasuredBy) -> Measured:
    """What each device found, by layout, in the order in which they ran."""
    directory = measured_by(PROGRAM)
    paths = {name: [directory / f"{name}-{device}.json" for device in range(n)] for name, n in NUM_DEVICES.items()}
    return {name: [json.loads(path.read_text()) for path in own] for name, own in paths.items()}


def test_steps_on_any_layout_are_those_of_transformers_stages(measured: Measured) -> None:
    """Three clipped and decayed steps by random schedules with halved backwards."""
    for found in (found for layout in measured.values() for found in layout):
        assert found["norms"] <= 1e-6, found
        assert found["weights"] <= 1e-6, found
        assert found["moved"] > 1e-4, found
        assert found["clipped"] > 2, found
        assert found["steps"] == 3, found


def test_a_training_state_resumes_on_its_layout_and_loads_on_others(measured: Measured) -> None:
    """The step after a resume on the same layout, bit for bit; what other layouts saved, loaded bit for bit."""
    for number, layout in enumerate(measured.values()):
        assert all(found["resumed"] == found["loaded"] == 0 for found in layout), layout
        # A pipeline's ends both load a tied embedding.
        assert number * NUM_STATE_TENSORS <= sum(found["num_loaded"] for found in layout)
    # Of the devices that share a stage one writes all of it, and the others hold no copy of that.
    assert [found["num_loaded"] for found in measured["tensor"]] == [NUM_STATE_TENSORS, 0]


def test_what_devices_have_whole_beside_shards_stays_the_same_on_all(measured: Measured) -> None:
    num_copies = {"tensor": 1, "both": 2, "replicas": 1}  # a stage's
    assert {name: len({found["copies"] for found in measured[name]}) for name in num_copies} == num_copies
