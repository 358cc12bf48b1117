"""Gradients in one block: those that they would be without, and gone when the block is closed and they are cleared."""

from __future__ import annotations

import gc

import torch
from torch import nn

from fuse.intrastage.gradient_block import GradientBlock
from fuse.intrastage.live_memory import LiveMemory


def backward(model: nn.Module) -> None:
    model(torch.arange(12.0).view(4, 3)).square().mean().backward()


def test_gradients_lie_in_one_block_and_are_what_they_are_without() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    backward(model)
    expected = [one.grad for one in model.parameters()]
    block = GradientBlock(model.parameters())
    with LiveMemory() as live:
        model.zero_grad(set_to_none=True)
        for _ in range(2):  # the second time it is the same block, of zeros again
            block.open()
            backward(model)
            torch.testing.assert_close([one.grad for one in model.parameters()], expected)
            assert (
                len({one.grad.untyped_storage().data_ptr() for one in model.parameters() if one.grad is not None}) == 1
            )
            block.clear()
        assert live.bytes > 0
        block.close()
        gc.collect()
        assert live.bytes == 0


def test_gradients_that_are_there_stay() -> None:
    """As those of what was trained early."""
    model = nn.Linear(3, 2)
    backward(model)
    before = [one.grad for one in model.parameters()]
    GradientBlock(model.parameters()).open()
    assert all(one.grad is grad for one, grad in zip(model.parameters(), before, strict=True))
