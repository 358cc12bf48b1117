"""Layers whose steps are fused: what the model computes and learns is that of transformers' own modules."""

from __future__ import annotations

import copy

import pytest
import torch

from fuse.intrastage import fused_layers
from fuse.intrastage.fused_layers import use_fused_layers

from .. import tiny_models

NAMES = ("rms_norm", "rotary", "swiglu")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_losses_and_gradients_are_the_modules(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.spread(tiny_models.build(tiny_models.language_model(architecture)))
    fused = copy.deepcopy(model)
    use_fused_layers(fused)
    calls = []
    for name in NAMES:
        used = getattr(fused_layers, name)
        monkeypatch.setattr(fused_layers, name, lambda *args, name=name, used=used: calls.append(name) or used(*args))
    input_ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    for one in (model, fused):
        one(input_ids=input_ids, labels=input_ids).loss.backward()
    assert {*calls} == {*NAMES}
    expected = dict(model.named_parameters())
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_other_types_are_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build(tiny_models.language_model("llama"), seed=0)
    use_fused_layers(model)
    for name in NAMES:
        monkeypatch.setattr(fused_layers, name, lambda *_: pytest.fail("fp32 alone is fused"))
    input_ids = torch.arange(6)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=input_ids)
    model.bfloat16()(input_ids=input_ids)
