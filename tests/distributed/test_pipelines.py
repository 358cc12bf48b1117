"""What `world.py` measured on worlds of 1, 2 and 4 processes: training on them is training in one process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fuse.benchmarks.training.comparison import compare
from fuse.intrastage.cost_profile import Shape, merge, profile_from_json
from fuse.intrastage.planned_times import PlannedTimes, times_of
from fuse.trace import Span
from schedules import Schedule, evaluate
from schedules.formats import schedule_from_text

from .conftest import Measured

PROGRAM = "world"
pytestmark = pytest.mark.processes

NUM_RANKS = {"one": 1, "two": 2, "four": 4, "again": 1}
PIPELINES = ["two", "four"]


@pytest.fixture(scope="module")
def measured(measured_by: Measured) -> Path:
    return measured_by(PROGRAM)


def results(measured: Path, world: str, check: str) -> list[Mapping[str, Any]]:
    """What each rank of a world found in a check."""
    paths = [measured / f"{world}-{rank}.json" for rank in range(NUM_RANKS.get(world, 2))]
    return [json.loads(path.read_text())[check] for path in paths]


def plan_of(schedule: Schedule) -> PlannedTimes:
    """As `world.py` has it."""
    seconds = {op: 1e-3 * schedule.problem.ticks(op) for _, op in schedule.ops()}
    return times_of(schedule, seconds, (0.0,) * len(schedule.problem.pipelines))


@pytest.mark.parametrize(("world", "num_runs"), [("two", 12), ("four", 6)])
def test_gradients_of_every_architecture_equal_one_process(measured: Path, world: str, num_runs: int) -> None:
    for found in results(measured, world, "check_gradients"):
        assert len(found) == num_runs
        assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("world", PIPELINES)
def test_two_models_in_opposite_directions_equal_one_process(measured: Path, world: str) -> None:
    for found in results(measured, world, "check_two_models"):
        differences = [found[key] for key in found if key == "serial" or key.startswith("random")]
        assert len(differences) == 5
        assert max(differences) <= 1e-6, found


@pytest.mark.parametrize("world", PIPELINES)
def test_every_operation_leaves_a_span_and_none_overlap(measured: Path, world: str) -> None:
    for found in results(measured, world, "check_two_models"):
        assert found["num_spans"] == 2 * (4 + 3)
        assert found["named"]
        assert found["overlaps"] == 0


def test_virtual_stages_shared_ranks_and_replicas_equal_one_process(measured: Path) -> None:
    for found in results(measured, "two", "check_placements"):
        assert max(found["virtual"], found["same rank"], found["replicas"]) <= 1e-6, found


def test_the_critic_in_two_replicas_beside_the_actor_equals_one_process(measured: Path) -> None:
    for found in results(measured, "four", "check_replicas"):
        assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("world", PIPELINES)
def test_random_schedules_with_split_backwards_equal_one_process(measured: Path, world: str) -> None:
    for found in results(measured, world, "check_splits"):
        differences = [found[key] for key in found if key.startswith("random")]
        assert len(differences) >= 4
        assert max(differences) <= 1e-6, found
        assert found["num_halves"] > 20


@pytest.mark.parametrize(("world", "num_schedules"), [("two", 4), ("four", 4)])
def test_every_operation_of_a_random_schedule_is_recorded_beside_its_plan(
    measured: Path, world: str, num_schedules: int
) -> None:
    results(measured, world, "check_splits")
    num_ranks = NUM_RANKS[world]
    for seed in range(num_schedules):
        paths = [measured / f"spans-{num_ranks}-{seed}-{rank}.json" for rank in range(num_ranks)]
        records = [json.loads(path.read_text()) for path in paths]
        schedule = schedule_from_text(records[0]["schedule"])
        spans = [[Span(**span) for span in record["spans"]] for record in records]
        timing = evaluate(schedule)
        for rank, of_rank in enumerate(spans):
            for name, ticks in (("planned_start_s", timing.start[rank]), ("planned_end_s", timing.end[rank])):
                assert [span.arguments[name] for span in of_rank] == pytest.approx([1e-3 * tick for tick in ticks])
        comparison = compare(schedule, plan_of(schedule), spans)
        assert comparison.makespan_planned_s == pytest.approx(1e-3 * timing.makespan)
        assert comparison.bubble_planned == pytest.approx(timing.bubble_ratio)
        # Gaps, and waits for messages already made, lie between operations.
        assert 0 < comparison.overhead_share + comparison.transfer_share <= comparison.bubble_executed + 1e-3


def test_ranks_measure_a_profile_of_all_stages_and_transfers_together(measured: Path) -> None:
    results(measured, "two", "check_measure")
    parts = [profile_from_json(json.loads((measured / f"profile-{rank}.json").read_text())) for rank in range(2)]
    profile = merge(parts)
    shapes = [Shape(1, 3), Shape(2, 7)]
    llama, critic = "llama.0", "neox-classifier.1"
    stages = [(llama, 0), (llama, 1), (critic, 0), (critic, 1), (critic, 2), (critic, 3)]
    assert {(cost.pipeline, cost.stage, cost.shape) for cost in profile.stages} == {
        (*stage, shape) for stage in stages for shape in shapes
    }
    crossings = [(llama, 0), (critic, 0), (critic, 2)]  # between stages 1 and 2 of the critic nothing is sent
    assert [(cost.pipeline, cost.stage, cost.shape) for cost in profile.transfers] == [
        (*crossing, shape) for crossing in crossings for shape in shapes
    ]
    assert {cost.pipeline: cost.input_grad_ticks for cost in profile.stages} == {llama: None, critic: None}
    assert min(cost.ticks for cost in profile.transfers) > 0


@pytest.mark.parametrize("world", PIPELINES)
def test_clipped_and_decayed_steps_equal_one_process(measured: Path, world: str) -> None:
    """Tied embeddings and replicas included; the norm is the whole model's, so any miscount of either shows in it."""
    everywhere = results(measured, world, "check_steps")
    for found in everywhere:
        for key, value in found.items():
            if key.endswith(("norm", "weights")):
                assert value <= 1e-6, found
            else:
                assert value > 1e-4, found
    assert {key for found in everywhere for key in found} >= {"qwen2 tied norm", "qwen2 tied weights"}


@pytest.mark.parametrize("world", PIPELINES)
def test_two_opposite_replicas_train_what_one_pipeline_does(measured: Path, world: str) -> None:
    """Tied embeddings, clipping, decay and an odd number of micro-batches included; checkpoints go either way."""
    for found in results(measured, world, "check_opposites"):
        for count in (5, 4):
            assert found[f"norm {count}"] <= 1e-6
            assert found[f"weights {count}"] <= 2e-6
            assert found[f"moved {count}"] > 1e-3
        assert found["without exchange"] > 1e-4
        assert [found[key] for key in found if "loaded" in key] == [0.0] * 5


@pytest.mark.parametrize("world", PIPELINES)
def test_opposite_replicas_have_the_same_bits_after_every_step(measured: Path, world: str) -> None:
    bits: dict[str, list[str]] = {}
    for found in results(measured, world, "check_opposites"):
        for key, value in found.items():
            if key.startswith("bits"):
                bits.setdefault(key.rpartition(" ")[0], []).append(value)
    assert len(bits) == 2 * 3 * NUM_RANKS[world], "numbers of micro-batches, steps, stages"
    for key, copies in bits.items():
        assert len(copies) == 2, key
        assert copies[0] == copies[1], key


@pytest.mark.parametrize("world", PIPELINES)
def test_replicas_on_two_ranks_have_each_moment_once(measured: Path, world: str) -> None:
    """About half of them each."""
    held: dict[str, list[dict[str, str]]] = {}
    for found in results(measured, world, "check_opposites"):
        for key, value in found.items():
            if key.startswith("moments"):
                held.setdefault(key.rpartition(" ")[0], []).append(value)
    assert len(held) == 2 * 3 * NUM_RANKS[world], "numbers of micro-batches, steps, stages"
    for key, copies in held.items():
        names = [name.partition(".")[2] for moments in copies for name in moments]
        assert set(Counter(names).values()) == {2}, key
        assert all(copies), key


@pytest.mark.parametrize("world", PIPELINES)
def test_a_checkpoint_of_opposite_replicas_has_each_tensor_once(measured: Path, world: str) -> None:
    results(measured, world, "check_opposites")
    keys = {}
    for name in ("plain", "both"):
        files = (measured / f"opposites-{NUM_RANKS[world]}-{name}").iterdir()
        keys[name] = sorted(key for path in files for key in load_file(path))
        assert len(keys[name]) == len(set(keys[name]))
    assert keys["both"] == keys["plain"]


@pytest.mark.parametrize(("saved_by", "loaded_by"), [("2", "1"), ("1", "2"), ("4", "1"), ("1", "4"), ("2", "4")])
def test_state_saved_by_some_ranks_loads_on_others_bit_for_bit(measured: Path, saved_by: str, loaded_by: str) -> None:
    saved: dict[str, torch.Tensor] = {}
    for path in measured.glob(f"saved-state-{saved_by}-[0-9].safetensors"):
        saved.update(load_file(path))
    loaded_paths = list(measured.glob(f"loaded-state-{saved_by}-{loaded_by}-*.safetensors"))
    assert len(loaded_paths) == int(loaded_by), (measured / "output.txt").read_text()
    loaded_keys = set()
    for path in loaded_paths:
        for key, tensor in load_file(path).items():
            assert torch.equal(tensor, saved[key]), key
            loaded_keys.add(key)
    assert loaded_keys == set(saved)
    assert any(saved[key].abs().max() > 0 for key in saved if ".exp_avg." in key)


def test_steps_taken_are_saved_and_each_tensor_is_saved_once(measured: Path) -> None:
    assert results(measured, "again", "check_state") == [{"state-1": 2.0, "state-2": 4.0, "state-4": 6.0}]
    files = list((measured / "state-4").iterdir())
    assert {path.suffix for path in files} == {".safetensors"}
    assert len(files) == 4
    keys = [key for path in files for key in load_file(path)]
    assert len(keys) == len(set(keys))
    assert "qwen2_tied.parameter.model.embed_tokens.weight" in keys


def test_a_dead_peer_ends_in_an_error_that_names_rank_operation_and_pipeline(measured: Path) -> None:
    survivor = json.loads((measured / "death-0.json").read_text())["check_death"]
    assert "rank 0, pipeline actor: waiting for the input of B llama.0.0.2 from rank 1 failed" in survivor["error"]


def test_a_silent_peer_ends_in_an_error(measured: Path) -> None:
    waiting = json.loads((measured / "silence-0.json").read_text())["check_silence"]
    assert "rank 0, pipeline actor: waiting for the input of B llama.0.0.2 from rank 1 failed" in waiting["error"]
    assert "Timed out" in waiting["error"]  # the peer would be silent for ever


@pytest.mark.parametrize("world", PIPELINES)
def test_steps_that_score_are_those_that_are_scored_before_to_the_bit(measured: Path, world: str) -> None:
    for found in results(measured, world, "check_late_scores"):
        for way in ("False", "True"):
            assert all(all(each) for each in found[way]["values"].values())
            assert found[way]["weights"]
            assert found[way]["without the order"] > 1e-4
