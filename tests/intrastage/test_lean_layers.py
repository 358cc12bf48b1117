"""What a layer keeps for its backward, counted; that its gradients are the model's; and whom it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from fuse.intrastage.lean_layers import keep_less
from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.vocabulary_ends import embed

from .chains import GROUPED, chain_of, micro_batch_of, model_of

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
        keep_less(norm, None)
        assert "forward" in vars(norm)
        for found, wanted in zip(results(), expected, strict=True):
            torch.testing.assert_close(found, wanted)
    finally:
        vars(norm).pop("forward", None)


def test_what_computes_otherwise_stays() -> None:
    """Gemma's norm adds one to its weight."""
    norm = GemmaRMSNorm(8)
    keep_less(norm, None)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_an_embedding_has_the_gradient_of_every_token_but_padding(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(64, 8, padding_idx=padding_idx)
    batches = torch.randint(0, 6, (2, 3, 5))
    grads = torch.randn(2, 3, 5, 8)
    for ids, grad in zip(batches, grads, strict=True):
        embedding(ids).backward(grad)
    assert embedding.weight.grad is not None
    expected, embedding.weight.grad = embedding.weight.grad, None
    embed(embedding, batches[0]).backward(grads[0])
    with LiveMemory() as live:
        embed(embedding, batches[1]).backward(grads[1])
        assert live.peak_bytes < embedding.weight.nbytes
    torch.testing.assert_close(embedding.weight.grad, expected)
