"""What a stage takes at any length is known from one run, which models that differ by head or directory share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fuse.driver import stage_probe
from fuse.driver.memory_changes import RECORDED_LENGTH, MemoryChanges
from fuse.driver.model_size import ModelSize
from fuse.driver.stage_bytes import ModelBytes
from fuse.driver.stage_probe import StageProbe, model_bytes
from fuse.training.model_spec import ModelSpec

from ..tiny_models import ModelKind, classifier, language_model


def probe_of(kind: ModelKind, stage: int = 1, **options: Any) -> StageProbe:
    return StageProbe(*kind, stage=stage, num_stages=3, layer_range=(0, 1), **options)


def bytes_of(kind: ModelKind) -> ModelBytes:
    spec = ModelSpec(model_class=kind[0], config=kind[1], dtype=torch.float32)
    options: dict[str, Any] = {"autocast": None, "gradient_checkpointing": False, "split_backward": False}
    return model_bytes(spec, ModelSize.of(spec).head_shape, device="cpu", **options)


@pytest.mark.parametrize(
    ("architecture", "stage", "attention", "options"),
    [
        ("llama", 0, "eager", {}),
        ("qwen3", 1, "sdpa", {"autocast": torch.bfloat16, "split_backward": True}),
        ("gpt_neox", 2, "sdpa", {"gradient_checkpointing": True}),
    ],
)
def test_one_run_foretells_others(architecture: str, stage: int, attention: str, options: dict[str, Any]) -> None:
    """Change by change, at a length that was not recorded."""
    kind = language_model(architecture)
    kind[1]._attn_implementation = attention
    probe = probe_of(kind, stage, **options)
    recorded = probe.run_training(RECORDED_LENGTH)
    assert len(recorded.parts) == 2 + bool(options.get("split_backward"))
    assert all(recorded.parts)
    assert recorded.at(1000) == probe.run_training(1000)
    assert probe.run_forward(RECORDED_LENGTH, 8).at(96) == probe.run_forward(96, 8)
    assert probe.run_scoring(RECORDED_LENGTH).at(96) == probe.run_scoring(96)


def test_changes_are_summed_part_by_part() -> None:
    changes = MemoryChanges(7, ((70, 490, -490), (-70, 12), (140, 6, -140)))
    assert [changes.kept(part) for part in range(3)] == [70, -58, 6]
    assert [changes.rise(part) for part in range(3)] == [560, 0, 146]
    assert changes.at(3) == MemoryChanges(3, ((30, 90, -90), (-30, 12), (60, 6, -60)))


def test_a_size_that_is_no_power_of_the_length_is_found() -> None:
    length, weights = RECORDED_LENGTH, {5_000_000}
    assert MemoryChanges(length, ((4 * length, -length * length, 256, 10_000_000),)).are_powers(weights)
    for other in (4 * (length + 1), length - 1, -30_000_000):
        assert not MemoryChanges(length, ((4 * length, other),)).are_powers(weights)


class _LongerLayer(nn.Module):
    """Keeps a tensor that is one token longer than its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        padded = nn.functional.pad(hidden, (0, 0, 1, 0))
        return self.layer(padded.sin()[:, 1:], *arguments, **options)


def test_a_stage_that_scales_otherwise_is_run_at_each_length() -> None:
    probe = probe_of(language_model())
    layers: Any = probe._stage._base.layers
    layers[0] = _LongerLayer(layers[0])
    assert not probe.run_training(RECORDED_LENGTH).are_powers(probe._weights)
    changes = probe.run_training(64)
    assert probe.trained(64)[0] == changes.kept(0)
    assert changes.kept(0) != probe.run_training(RECORDED_LENGTH).at(64).kept(0)


def test_models_that_differ_by_head_or_directory_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage_probe._measured.cache_clear()
    own = bytes_of(classifier(name_or_path="one"))
    stage_probe._measured.cache_clear()
    language = bytes_of(language_model(name_or_path="other"))

    def never(model_class: type[PreTrainedModel], *arguments: Any, **options: Any) -> None:
        raise AssertionError(model_class)

    monkeypatch.setattr(stage_probe, "StageProbe", never)
    shared = bytes_of(classifier())
    assert shared == own
    assert shared.head != language.head
    with pytest.raises(AssertionError):
        bytes_of(classifier("qwen2"))
