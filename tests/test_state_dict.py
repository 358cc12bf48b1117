"""Weights that do not fit a model are refused by name; tied tensors may come under any of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from trl.trainer.callbacks import SyncRefModelCallback

from fuse.state_dict import (
    WeightLayout,
    Weights,
    WeightStream,
    adopt_state_dict,
    check_fit,
    check_state_dict,
    load_state_dict,
    mix_tensors,
    release_weights,
    write,
)

EXPECTED = {"a": torch.Size([2, 3]), "b": torch.Size([4])}


def weights(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_weights_that_fit_are_accepted() -> None:
    check_state_dict(weights(a=(2, 3), b=(4,)), EXPECTED, "a model")
    check_state_dict(weights(a=(2, 3)), EXPECTED, "a model", optional={"b"})
    check_state_dict(weights(a=(2, 3), b=(4,), c=(1,)), EXPECTED, "a stage", may_have_more=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (weights(a=(2, 3)), "state dict for a model does not fit: b is missing: load weights of the same"),
        (weights(a=(2, 3), b=(4,), c=(1,)), "c is not part of the model"),
        (weights(a=(3, 2), b=(4,)), r"a is \[3, 2\], the model has \[2, 3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_state_dict(given, EXPECTED, "a model")


def test_three_problems_are_named_and_the_rest_counted() -> None:
    with pytest.raises(ValueError, match=r"^state does not fit: 0 is missing; 1 is missing; 2 is missing and 2 more: "):
        check_fit({}, {str(number): "[1]" for number in range(5)}, "state", "give some")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.head = nn.Linear(2, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("positions", torch.arange(3))


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_a_tied_tensor_may_come_under_any_of_its_names(name: str) -> None:
    model = Tied()
    load_state_dict(model, {name: torch.ones(5, 2)})
    assert torch.equal(model.head.weight, torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"embedding.weight is missing; head.weight is missing"):
        WeightLayout.of(model).check({"positions": torch.arange(3)})


def mix(model: nn.Module, weights: Weights, alpha: float) -> None:
    """As a model worker does with what comes to it."""
    WeightLayout.of(model).check(weights)
    mix_tensors(model, WeightStream.of(weights).tensors, alpha)


@pytest.mark.parametrize("name", ["embedding.weight", "head.weight"])
def test_weights_are_mixed_as_trl_mixes_them(name: str) -> None:
    """To the bit, tied ones once, and without writing to what the model had adopted."""
    model, oracle, policy = Tied(), Tied(), Tied()
    adopted = oracle.embedding.weight.detach().clone()
    before = adopted.clone()
    adopt_state_dict(model, {name: adopted, "positions": torch.arange(3)})
    for _ in range(3):
        mix(model, {name: policy.embedding.weight}, 0.3)
        SyncRefModelCallback._sync_target_model(policy, oracle, 0.3)
        assert torch.equal(model.head.weight, oracle.head.weight)
    assert torch.equal(adopted, before)
    with pytest.raises(ValueError, match="is not part of the model"):
        mix(model, {"other": torch.zeros(1)}, 0.5)


def stream(shapes: dict[str, torch.Size], tensors: dict[str, Tensor], read: list[str]) -> WeightStream:
    """Says in `read` which of them were asked for."""

    def come() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            read.append(name)
            yield name, tensor

    return WeightStream(shapes, come())


def test_a_stream_that_does_not_fit_is_refused_before_it_is_read() -> None:
    model, read = Tied(), list[str]()
    with pytest.raises(ValueError, match=r"head.weight is \[5, 3\], the model has \[5, 2\]"):
        adopt_state_dict(model, stream({"head.weight": torch.Size([5, 3])}, {"head.weight": torch.ones(5, 3)}, read))
    assert not read
    mixed = stream({"head.weight": torch.Size([5, 2])}, {"head.weight": torch.ones(5, 2)}, read)
    before = model.head.weight.detach().clone()
    mix(model, mixed, 0.5)
    assert torch.equal(model.embedding.weight, before.mul(0.5).add_(0.5))
    adopt_state_dict(model, stream({"head.weight": torch.Size([5, 2])}, {"head.weight": torch.ones(5, 2)}, read))
    assert torch.equal(model.embedding.weight, torch.ones(5, 2))
    assert read == ["head.weight"] * 2


def test_a_tied_tensor_comes_under_all_of_its_names_once() -> None:
    layout, tensor = WeightLayout.of(Tied()), torch.ones(5, 2)
    for given in ([("head.weight", tensor)], [("embedding.weight", tensor), ("head.weight", tensor)]):
        assert [name for name, _ in layout.under_all_names(given)] == ["embedding.weight", "head.weight"]


def test_weights_on_a_device_are_written_to_where_they_were() -> None:
    """For captured graphs know them by their place; but for those that were released, which get another."""
    layer = nn.Linear(3, 2).requires_grad_(False)
    address = layer.weight.data_ptr()
    write(layer.weight, torch.ones(2, 3, dtype=torch.bfloat16))
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.weight, torch.ones(2, 3))
    release_weights(layer)
    write(layer.weight, torch.full((2, 3), 2.0))
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.weight, torch.full((2, 3), 2.0))
