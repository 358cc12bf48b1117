"""Normalisation, gate and rotary embedding, native and by torch: results and gradients against definitions in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fuse.ops import describe, rms_norm, rotary, swiglu
from fuse.ops.rms_norm import rms_norm_reference
from fuse.ops.rotary import rotary_reference
from fuse.ops.swiglu import swiglu_reference

EPSILON = 1e-5
SHAPES = [(1, 1), (3, 16), (2, 5, 40), (4, 33), (0, 8), (2, 3, 256)]
"""Widths of whole vectors, of less than one, and of some with a rest."""


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape: tuple[int, ...], is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr(rms_norm, "choose", lambda *_: (None, "torch"))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)]
    grad = torch.randn(shape, generator=generator).transpose(0, -1).contiguous().transpose(0, -1)
    own, exact = ([one.to(dtype).requires_grad_() for one in given] for dtype in (torch.float32, torch.float64))
    output, expected = rms_norm.rms_norm(*own, EPSILON), rms_norm_reference(*exact, EPSILON)
    close(output, expected)
    for found, wanted in zip(
        torch.autograd.grad(output, own, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        close(found, wanted)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gate(shape: tuple[int, ...], is_native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_native:
        monkeypatch.setattr(swiglu, "choose", lambda *_: (None, "torch"))
    generator = torch.Generator().manual_seed(0)
    given = [10 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)]
    grad = torch.randn(shape, generator=generator)
    own, exact = ([one.to(dtype).requires_grad_() for one in given] for dtype in (torch.float32, torch.float64))
    output, expected = swiglu.swiglu(*own), swiglu_reference(*exact)
    close(output, expected)
    for found, wanted in zip(
        torch.autograd.grad(output, own, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        close(found, wanted)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(("heads", "head_dim", "rows_of_angles"), [(1, 2, 1), (3, 40, 1), (2, 64, 4), (4, 34, 4)])
def test_rotary(
    heads: int, head_dim: int, rows_of_angles: int, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Angles of all samples or of each; the halves' differ, so that neither stands in for the other."""
    if not is_native:
        monkeypatch.setattr(rotary, "choose", lambda *_: (None, "torch"))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 5, heads, head_dim, generator=generator).transpose(1, 2)
    cosines, sines = torch.randn(2, rows_of_angles, 5, head_dim, generator=generator)
    grad = torch.randn(4, heads, 5, head_dim, generator=generator)
    own, exact = (states.to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    output, expected = rotary.rotary(own, cosines, sines), rotary_reference(exact, cosines.double(), sines.double())
    close(output, expected)
    close(torch.autograd.grad(output, own, grad)[0], torch.autograd.grad(expected, exact, grad.double())[0])


def test_large_gates_overflow_nowhere() -> None:
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    output = swiglu.swiglu(gate, torch.ones(5))
    close(output, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    close(torch.autograd.grad(output.sum(), gate)[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_native_code_serves() -> None:
    served = describe()
    assert all(served[name].startswith("native C++") for name in ("rms_norm", "rotary", "swiglu"))
