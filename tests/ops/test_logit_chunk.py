"""A chunk of logits is reduced, and turned into its gradient, alike by all code that can; whole results are tested in
test_linear_logprob.py."""

from __future__ import annotations

import pytest
import torch

from fuse.ops.logit_chunk import (
    accumulate,
    accumulate_reference,
    differentiate,
    differentiate_reference,
)

TEMPERATURE = 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_native_code_reduces_chunks_as_the_reference_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 40, generator=generator, dtype=torch.float64)).to(dtype)
    targets, grads = torch.tensor([7, 10, 60]), torch.randn(2, 3, generator=generator, dtype=torch.float64)
    results = []
    for reduce, turn in ((accumulate, differentiate), (accumulate_reference, differentiate_reference)):
        chunk = logits.clone()
        statistics = torch.tensor([-1e38, 0, 0, 0], dtype=torch.float64)[:, None].repeat(1, 3)
        reduce(chunk[:, :25], targets, 7, TEMPERATURE, statistics)
        reduce(chunk[:, 25:], targets, 32, TEMPERATURE, statistics)
        turn(chunk, targets, 7, TEMPERATURE, statistics, grads)
        results.append((statistics, chunk))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(results[0][1], results[1][1], rtol=tolerance, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_columns", [1, 17, 1024, 16_385, 40_001])
def test_cuda_code_reduces_chunks_as_c_plus_plus_code_does(dtype: torch.dtype, num_columns: int) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    logits = (5 * torch.randn(3, num_columns + 3, generator=generator)).to(dtype)
    grads = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, num_columns // 2, num_columns])
    results = []
    for device in ("cpu", "cuda"):
        chunk, ids = logits.to(device, copy=True)[:, :num_columns], targets.to(device)
        statistics = torch.tensor([-1e38, 0, 0, 0], dtype=torch.float64, device=device)[:, None].repeat(1, 3)
        accumulate(chunk, ids, 0, TEMPERATURE, statistics)
        differentiate(chunk, ids, 0, TEMPERATURE, statistics, grads.to(device))
        results.append((statistics.cpu(), chunk.cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=1e-12)
    assert torch.equal(results[1][1], results[0][1])
