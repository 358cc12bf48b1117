"""Layers whose steps are fused: what the model computes and learns is that of its own modules, and less is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from fuse.intrastage import fused_layers
from fuse.intrastage.fused_layers import use_fused_layers
from fuse.intrastage.live_memory import LiveMemory

from .. import tiny_models
from .chains import GROUPED, chain_of, micro_batch_of, model_of

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


HIDDEN, INNER, KEYS, HEADS = 32, 48, 16, 4


def test_a_layer_keeps_inputs_of_products_and_little_else() -> None:
    """Per position: inputs and outputs of both norms; q, k, v and what attention made; gate and up."""
    assert (GROUPED["hidden_size"], GROUPED["intermediate_size"]) == (HIDDEN, INNER)
    held = []
    for layers in ((1, 2), (1, 3)):
        stage = chain_of("transformers", model_of("llama"), ((0, 1), layers, (layers[1], 4)), split_backward=True)[1]
        stage_input = torch.randn(2, 7, HIDDEN)
        with LiveMemory() as live:
            stage.forward(0, micro_batch_of(7), stage_input)
            held.append(live.bytes)
        stage.backward(0, torch.randn(2, 7, HIDDEN))
    norms, attention = 4 * HIDDEN + 2, HIDDEN + 2 * KEYS + HIDDEN + HEADS
    assert held[1] - held[0] == 4 * 14 * (norms + attention + 2 * INNER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_has_the_gradients_of_the_one_that_it_replaces(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm: Any = model_of("llama").model.layers[0].input_layernorm
    given = (0.1 * torch.randn(2, 5, HIDDEN)).to(dtype)
    grad = torch.randn(2, 5, HIDDEN).to(dtype)

    def results() -> tuple[Tensor, ...]:
        hidden = given.clone().requires_grad_()
        said = norm(hidden)
        return said, *torch.autograd.grad(said, (hidden, norm.weight), grad.to(said.dtype))

    try:
        expected = results()
        use_fused_layers(norm)
        assert "forward" in vars(norm)
        for found, wanted in zip(results(), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    finally:
        vars(norm).pop("forward", None)


def test_what_computes_otherwise_stays() -> None:
    """Gemma's norm adds one to its weight."""
    norm = GemmaRMSNorm(8)
    use_fused_layers(norm)
    assert "forward" not in vars(norm)
