"""Memory that is given back and taken again under the same tensors."""

from __future__ import annotations

import pytest
import torch

from fuse.storages import Storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_views_and_ties_come_back_to_the_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 7).mul(100).to(dtype)
    view, expected = tensor[1:, ::2], tensor.clone()
    storages = Storages()
    storages.release([tensor, view, torch.empty(0)], keep_bits=True)
    assert storages.are_released
    assert tensor.untyped_storage().nbytes() == 0
    storages.restore()
    assert not storages.are_released
    assert torch.equal(tensor, expected)
    assert torch.equal(view, expected[1:, ::2])
    assert view.data_ptr() == tensor[1:, ::2].data_ptr()


def test_what_nobody_needs_comes_back_finite() -> None:
    tensor = torch.full((3, 3), torch.nan)
    storages = Storages()
    storages.release([tensor], keep_bits=False)
    storages.restore()
    assert torch.equal(tensor, torch.zeros(3, 3))


def test_an_optimizer_goes_on_where_it_was() -> None:
    def trained(*, released: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer, inputs = torch.nn.Linear(4, 4), torch.randn(2, 4)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        for _ in range(3):
            layer(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if released:
                storages = Storages()
                moments = (one for state in optimizer.state.values() for one in state.values())
                storages.release((*layer.parameters(), *moments), keep_bits=True)
                storages.restore()
        return layer.weight.detach()

    assert torch.equal(trained(released=True), trained(released=False))
