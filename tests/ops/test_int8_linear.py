"""Linear layers of 8-bit weights: the rounding of weights, and products against those written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fuse.ops import describe
from fuse.ops.int8_linear import int8_linear, int8_linear_reference, quantize_int8


def test_no_weight_is_off_by_more_than_half_a_unit() -> None:
    weight = torch.randn(5000, 33, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    weight[8] *= 1e-6
    quantized, scales = quantize_int8(weight)
    assert quantized.dtype == torch.int8
    assert int(quantized.abs().max()) == 127
    torch.testing.assert_close(scales, weight.abs().amax(dim=1) / 127)
    assert bool(((quantized * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all())


@pytest.mark.parametrize("implementation", [int8_linear, int8_linear_reference])
@pytest.mark.parametrize(("rows", "outs", "width"), [(0, 4, 16), (1, 9, 64), (2, 8, 70), (3, 5, 15), (5, 3, 4200)])
def test_equals_the_products_written_out(
    implementation: Callable[..., Tensor], rows: int, outs: int, width: int
) -> None:
    """Widths around vectors and around what 32 bits add up; numbers of rows and outputs that are no multiples."""
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 3, rows)[:, None]
    quantized, scales = quantize_int8(torch.randn(outs, width, generator=generator))
    expected = (inputs.double() @ (quantized.double() * scales.double()[:, None]).T).float()
    largest = inputs.abs().amax(dim=1, keepdim=True) * width**0.5
    assert bool(((implementation(inputs, quantized, scales) - expected).abs() <= 1e-4 * largest).all())


def test_the_largest_sums_do_not_overflow() -> None:
    inputs, quantized = torch.ones(2, 8192), torch.full((5, 8192), 127, dtype=torch.int8)
    expected = torch.full((2, 5), 127 * 8192.0)
    torch.testing.assert_close(int8_linear(inputs, quantized, torch.ones(5)), expected, rtol=1e-4, atol=0)


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 3, 100, generator=generator)
    inputs[0, 1] = 0
    quantized, scales = quantize_int8(torch.randn(6, 100, generator=generator))
    together = int8_linear(inputs, quantized, scales)
    for i, j in ((0, 0), (0, 1), (1, 2)):
        assert torch.equal(together[i, j], int8_linear(inputs[i, j], quantized, scales))


def test_native_code_serves() -> None:
    assert describe()["int8_linear"].startswith("native C++ for float32")
