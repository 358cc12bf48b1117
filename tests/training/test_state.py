"""Saving and loading on one rank: refusals, and that nothing unpickles. Several ranks: tests/distributed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fuse.intrastage.optimizer import AdamWConfig, ModelOptimizer
from fuse.intrastage.transformers_stage import TransformersStage
from fuse.micro_batch import Metrics, MicroBatch
from fuse.training import state
from fuse.training.state import check_saved, load_state, save_state

from ..tiny_models import build, language_model

BATCH = MicroBatch(input_ids=torch.tensor([[3, 1, 4, 1, 5]]), head_index=torch.arange(5), targets=None)


def loss(hidden: Tensor, head: nn.Module, micro_batch: MicroBatch) -> tuple[Tensor, Metrics]:
    return head(hidden).square().mean(), {}


def optimizer_of(num_stages: int = 2, num_layers: int = 3, seed: int = 0, hidden_size: int = 16) -> ModelOptimizer:
    """A model with random weights that has taken one step, so that no moment is zero by accident."""
    model = language_model(vocab_size=32, hidden_size=hidden_size, num_hidden_layers=num_layers)
    weights = build(model, seed=seed).state_dict()
    stages = {
        (0, number): TransformersStage(*model, stage=number, num_stages=num_stages, loss=loss)
        for number in range(num_stages)
    }
    hidden = grad = None
    for stage in stages.values():
        stage.load_state_dict(weights)
        hidden = stage.forward(0, BATCH, hidden)
    for stage in reversed(stages.values()):
        grad = stage.backward(0, grad)
    optimizer = ModelOptimizer("actor", stages, None, AdamWConfig())
    optimizer.step(0.01)
    return optimizer


def tensors(optimizer: ModelOptimizer) -> dict[str, Tensor]:
    return {f"{name} {part}": one.clone() for name, parts in optimizer.state() for part, one in parts.items()}


def assert_same(first: ModelOptimizer, second: ModelOptimizer) -> None:
    got, expected = tensors(first), tensors(second)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert first.num_steps == second.num_steps


def test_another_stage_split_loads_it_bit_for_bit_without_unpickling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, other = optimizer_of(2), optimizer_of(3, seed=1)
    other.num_steps = 9
    save_state(tmp_path / "state", {"actor": saved, "critic": optimizer_of(1, seed=2)})
    assert {path.suffix for path in (tmp_path / "state").iterdir()} == {".safetensors"}

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    load_state(tmp_path / "state", {"actor": other})
    assert_same(other, saved)


def test_what_is_written_is_made_in_memory_a_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "FILE_BYTES", 20_000)
    saved, other = optimizer_of(2, hidden_size=32), optimizer_of(1, seed=1, hidden_size=32)
    written = save_state(tmp_path, {"actor": saved})
    assert len(written) > 4
    assert max(written.values()) < 2 * state.FILE_BYTES, "no tensor is as large"
    load_state(tmp_path, {"actor": other})
    assert_same(other, saved)


def test_steps_after_loading_are_those_not_interrupted(tmp_path: Path) -> None:
    saved, other = optimizer_of(2), optimizer_of(1, seed=1)
    saved.step(0.1)
    saved.step(0.1)
    save_state(tmp_path, {"actor": saved})
    load_state(tmp_path, {"actor": other})
    # Without gradients, AdamW moves weights by the moments and the step count it has.
    saved.step(0.1)
    other.step(0.1)
    assert_same(other, saved)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"actor": optimizer_of()})

    def refused(optimizer: ModelOptimizer, message: str, name: str = "actor") -> None:
        before = tensors(optimizer)
        with pytest.raises(ValueError, match=message):
            load_state(tmp_path / "state", {name: optimizer})
        assert all(torch.equal(one, before[key]) for key, one in tensors(optimizer).items())

    refused(optimizer_of(num_layers=4), r"model\.layers\.3\.\S+ is missing.*and \d+ more: resume with")
    refused(optimizer_of(num_layers=2), r"actor\.\S+\.layers\.2\.\S+ is not part of the model")
    refused(optimizer_of(hidden_size=8), r"is torch.float32 \[32, 16\], the model has torch.float32 \[32, 8\]")
    refused(optimizer_of(), r"critic\.step is missing", name="critic")


def test_a_damaged_or_absent_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the training state"):
        load_state(tmp_path / "nowhere", {"actor": optimizer_of()})
    save_state(tmp_path / "state", {"actor": optimizer_of()})
    file = next((tmp_path / "state").iterdir())
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cannot read the training state .*resume from another"):
        load_state(tmp_path / "state", {"actor": optimizer_of()})


def test_a_tensor_in_another_type_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, {"actor": optimizer_of()})
    file = next(tmp_path.iterdir())
    state = load_file(file)
    name = "actor.parameter.model.norm.weight"
    save_file({**state, name: state[name].half()}, file)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is torch.float16"):
        load_state(tmp_path, {"actor": optimizer_of()})


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot save the training state in .*file"):
        save_state(tmp_path / "file", {"actor": optimizer_of()})


def test_what_ranks_wrote_must_be_seen(tmp_path: Path) -> None:
    here = tmp_path / "state"
    seen = save_state(here, {"actor": optimizer_of()})
    check_saved(here, [seen, seen])
    (name,) = seen
    for missing in ({**seen, "other": 7}, {name: seen[name] + 1}, {}):
        with pytest.raises(OSError, match=r"the training state of rank 1 is not in .*state .*name an output_dir"):
            check_saved(here, [seen, missing])
    with pytest.raises(OSError, match="rank 0"):
        check_saved(tmp_path / "nowhere", [seen])
