"""Linear layers over a few rows: products against torch's, to rounding, and rows that do not depend on each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from fuse.engines.few_rows import FewRowsLinear, use_few_rows
from fuse.ops import describe
from fuse.ops.native import extension
from fuse.ops.skinny_linear import ROWS, skinny_linear, skinny_linear_reference
from fuse.threads import torch_threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with torch_threads(1), torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [0, 1, *ROWS, 12])
@pytest.mark.parametrize(("outs", "width"), [(1, 1), (4, 16), (9, 33), (7, 640), (30, 15)])
def test_equals_the_products_written_out(rows: int, outs: int, width: int) -> None:
    """Widths around vectors; numbers of rows and outputs that are no multiples of what is done at once."""
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(rows, 1, width, generator=generator)
    weight, bias = torch.randn(outs, width, generator=generator), torch.randn(outs, generator=generator)
    expected = (inputs.double() @ weight.double().T).float()
    for implementation in (skinny_linear, skinny_linear_reference):
        torch.testing.assert_close(implementation(inputs, weight), expected, rtol=1e-5, atol=1e-5 * width**0.5)
        torch.testing.assert_close(
            implementation(inputs, weight, bias), expected + bias, rtol=1e-5, atol=1e-5 * width**0.5
        )


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, weight = torch.randn(9, 100, generator=generator), torch.randn(6, 100, generator=generator)
    together = skinny_linear(inputs, weight)
    for first, last in ((0, 4), (2, 7), (4, 9)):
        assert torch.equal(together[first:last], skinny_linear(inputs[first:last], weight))


def test_layers_keep_their_weights_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected, names = model(inputs), list(model.state_dict())
    use_few_rows(model)
    assert isinstance(model[0], FewRowsLinear)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(inputs), expected)
    with torch.enable_grad():
        model(inputs).sum().backward()
    assert model[0].weight.grad is not None


def test_native_code_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe()["skinny_linear"].startswith("native C++ for 1 to 9 rows")
    native, _ = extension()
    called = []
    monkeypatch.setattr(native, "skinny_linear", lambda rows, weight, output: called.append(len(rows)))
    for rows in (0, 1, 9, 10):
        skinny_linear(torch.ones(rows, 4), torch.ones(5, 4))
    assert called == [1, 9]
