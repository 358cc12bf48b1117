"""Embeddings of stages that train: gradients are added where they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fuse.intrastage.live_memory import LiveMemory
from fuse.intrastage.vocabulary_ends import embed


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
