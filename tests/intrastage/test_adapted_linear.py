"""A linear layer with an adapter: whichever way it computes, it says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from fuse.intrastage import adapted_linear
from fuse.intrastage.adapted_linear import is_faster_merged
from fuse.intrastage.adapters import Adapters, base_of, with_adapter
from fuse.merged_weight import merged_weight

from ..tiny_models import build, language_model

MANY = 4096


@pytest.fixture
def layer() -> Any:
    """Of [24, 16], with a bias."""
    model = build(language_model("qwen2"))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    adapters = Adapters.of(base_of(with_adapter(build(language_model("qwen2")), lora, "peft_config")))
    adapters.inject(model)
    made = model.model.layers[0].self_attn.q_proj
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("num_rows", [1, 5, MANY])
def test_it_computes_without_gradients_what_peft_does(
    layer: Any, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: list[Any] = []
    monkeypatch.setattr(adapted_linear, "merged_weight", lambda one: merges.append(one) or merged_weight(one))
    inputs = torch.randn(1, num_rows, 16)
    expected = type(layer).forward(layer, inputs)
    assert torch.equal(layer(inputs), expected)
    assert not merges, "gradients go by rank r"
    with torch.inference_mode():
        torch.testing.assert_close(layer(inputs), expected.detach(), atol=1e-5, rtol=1e-5)
    assert len(merges) == (num_rows == MANY)
    assert torch.equal(layer.base_layer(inputs) + 0, layer.base_layer(inputs)), "nothing is written to W0"


def test_without_adapters_it_is_the_base_to_the_bit(layer: Any) -> None:
    layer._disable_adapters = True
    for num_rows in (3, MANY):
        inputs = torch.randn(num_rows, 16)
        with torch.inference_mode():
            assert torch.equal(layer(inputs), layer.base_layer(inputs))


def test_in_narrow_types_nothing_is_merged(layer: Any) -> None:
    inputs = torch.randn(MANY, 16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(inputs), type(layer).forward(layer, inputs))


def test_more_rows_are_for_merging_and_a_larger_weight_against_it() -> None:
    assert not is_faster_merged(64, 1536, 576)
    assert is_faster_merged(1 << 14, 1536, 576)
    assert not is_faster_merged(1 << 12, 1 << 14, 1 << 14)
