"""Linear layers of 8-bit and 4-bit weights: the rounding of weights, and products against those written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fuse.ops import describe
from fuse.ops.quantized_linear import (
    INT4,
    INT8,
    Quantization,
    int4_linear_reference,
    int8_linear,
    int8_linear_reference,
    quantize_int4,
    quantize_int8,
)

REFERENCES = {INT8: int8_linear_reference, INT4: int4_linear_reference}
IDS = {INT8: "int8", INT4: "int4"}
KINDS = pytest.mark.parametrize("kind", [INT8, INT4], ids=IDS.get)


def weights_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """None of them about zero."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def test_no_8_bit_weight_is_off_by_more_than_half_a_unit() -> None:
    weight = weights_of((5000, 33))
    weight[7] = 0
    weight[8] *= 1e-6
    quantized, scales = quantize_int8(weight)
    assert quantized.dtype == torch.int8
    assert int(quantized.abs().max()) == 127
    torch.testing.assert_close(scales, weight.abs().amax(dim=1) / 127)
    assert bool(((quantized * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all())


def test_no_4_bit_weight_is_off_by_more_than_half_a_step_of_its_group() -> None:
    weight = weights_of((5000, 96))
    weight[7] = 0
    weight[8] *= 1e-6
    quantized, ranges = quantize_int4(weight)
    assert (quantized.shape, quantized.dtype) == ((5000, 3, 16), torch.uint8)
    assert (ranges.shape, ranges.dtype) == ((5000, 3, 2), torch.bfloat16)
    assert {int((quantized & 15).min()), int(quantized.max() >> 4)} == {0, 15}, "all 16 steps are used"
    groups = weight.unflatten(1, (3, 32))
    least, largest = groups.aminmax(dim=2)
    torch.testing.assert_close(ranges[..., 0].float(), least, rtol=2**-8, atol=0)
    torch.testing.assert_close(ranges[..., 1].float(), (largest - least) / 15, rtol=0.03, atol=0)
    rounded = int4_linear_reference(torch.eye(96), quantized, ranges).T.unflatten(1, (3, 32))
    ends = torch.maximum(least.abs(), largest.abs()) * 2**-8
    assert bool(((rounded - groups).abs().amax(dim=2) <= (largest - least) / 30 + ends).all())


@KINDS
@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(
    ("rows", "outs", "width"), [(0, 4, 16), (1, 9, 64), (2, 8, 70), (3, 5, 15), (3, 4, 288), (5, 3, 4200)]
)
def test_equals_the_products_written_out(kind: Quantization, is_native: bool, rows: int, outs: int, width: int) -> None:
    """Widths around vectors, groups and what 32 bits add up; numbers of rows and outputs that are no multiples."""
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    parts = kind.quantize(weights_of((outs, width), seed=width))
    product: Callable[..., Tensor] = kind.linear if is_native else REFERENCES[kind]
    expected = (inputs.double() @ written_out(kind, width, *parts).double().T).float()
    largest = inputs.abs().amax(dim=1, keepdim=True) * width**0.5
    assert bool(((product(inputs, *parts) - expected).abs() <= 1e-4 * largest).all())


def written_out(kind: Quantization, width: int, quantized: Tensor, scales: Tensor) -> Tensor:
    """The matrix that the weights stand for, weight by weight where they are packed."""
    if kind is INT8:
        return quantized * scales[:, None]
    weight = torch.empty(len(quantized), width)
    for place in range(width):
        group, element = divmod(place, 32)
        steps = quantized[:, group, element % 16] // (16 if element >= 16 else 1) % 16
        weight[:, place] = scales[:, group, 1].float() * steps + scales[:, group, 0].float()
    return weight


def test_the_largest_sums_do_not_overflow() -> None:
    inputs, quantized = torch.ones(2, 8192), torch.full((5, 8192), 127, dtype=torch.int8)
    expected = torch.full((2, 5), 127 * 8192.0)
    torch.testing.assert_close(int8_linear(inputs, quantized, torch.ones(5)), expected, rtol=1e-4, atol=0)


@KINDS
def test_a_row_does_not_depend_on_the_others(kind: Quantization) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 3, 300, generator=generator)
    inputs[0, 1] = 0
    parts = kind.quantize(weights_of((6, 300)))
    together = kind.linear(inputs, *parts)
    for i, j in ((0, 0), (0, 1), (1, 2)):
        assert torch.equal(together[i, j], kind.linear(inputs[i, j], *parts))


def test_native_code_serves() -> None:
    assert describe()["quantized_linear"].startswith("native C++ for float32")
