"""Decode attention: against softmax written out, over lengths, groups, strides and head sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fuse.ops import describe
from fuse.ops.decode_attention import decode_attention, decode_attention_reference


def written_out(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // keys.shape[1]
    output = torch.empty_like(query)
    for row, length in enumerate(lengths.tolist()):
        for head in range(query.shape[1]):
            scores = scale * keys[row, head // group, :length].double() @ query[row, head].double()
            output[row, head] = scores.softmax(0) @ values[row, head // group, :length].double()
    return output


def inputs(
    rows: int, kv_heads: int, group: int, head_dim: int, context: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Caches larger than what is used, so that the views have the strides of slots; lengths 1 to context."""
    generator = torch.Generator().manual_seed(context)
    query = torch.randn(rows, 1, kv_heads * group, head_dim, generator=generator).to(dtype).transpose(1, 2)[:, :, 0]
    cache = torch.randn(2, rows + 2, kv_heads, context + 5, head_dim, generator=generator).to(dtype)
    lengths = torch.randint(1, context + 1, (rows,), generator=generator)
    lengths[-1:] = context
    return query, cache[0, :rows, :, :context], cache[1, :rows, :, :context], lengths


@pytest.mark.parametrize("implementation", [decode_attention, decode_attention_reference])
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(4, 1, 64), (2, 3, 32), (1, 8, 16), (2, 2, 20), (3, 1, 7)])
@pytest.mark.parametrize("context", [1, 3, 16, 61])
def test_equals_softmax_written_out(implementation, kv_heads: int, group: int, head_dim: int, context: int) -> None:
    query, keys, values, lengths = inputs(5, kv_heads, group, head_dim, context)
    expected = written_out(query, keys, values, lengths, 0.3)
    torch.testing.assert_close(implementation(query, keys, values, lengths, 0.3), expected, rtol=1e-5, atol=2e-6)


def test_no_rows() -> None:
    query, keys, values, lengths = inputs(0, 2, 2, 16, 8)
    assert decode_attention(query, keys, values, lengths, 0.25).shape == (0, 4, 16)


def test_large_scores_do_not_overflow() -> None:
    query, keys, values, lengths = inputs(3, 2, 1, 16, 20)
    expected = written_out(query, keys, values, lengths, 100.0)
    torch.testing.assert_close(decode_attention(query, keys, values, lengths, 100.0), expected, rtol=1e-4, atol=1e-4)


def test_tokens_beyond_a_rows_length_are_not_read() -> None:
    query, keys, values, lengths = inputs(4, 2, 2, 16, 30)
    expected = decode_attention(query, keys, values, lengths, 0.25)
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length:] = math.nan
        values[row, :, length:] = math.nan
    assert torch.equal(decode_attention(query, keys, values, lengths, 0.25), expected)


def test_bfloat16_is_served_by_torch() -> None:
    query, keys, values, lengths = inputs(4, 2, 2, 16, 30, torch.bfloat16)
    expected = written_out(query, keys, values, lengths, 0.25)
    torch.testing.assert_close(decode_attention(query, keys, values, lengths, 0.25), expected, rtol=0.03, atol=0.03)


def test_native_code_serves() -> None:
    assert describe()["decode_attention"].startswith("native C++ for float32")


@pytest.mark.parametrize("implementation", [decode_attention, decode_attention_reference])
def test_rows_of_any_slots(implementation) -> None:
    """Several rows of one slot, with different lengths, and slots without any."""
    query, keys, values, lengths = inputs(5, 2, 3, 32, 19)
    slots = torch.tensor([3, 3, 0, 4, 3])
    expected = written_out(query, keys[slots], values[slots], lengths, 0.3)
    torch.testing.assert_close(implementation(query, keys, values, lengths, 0.3, slots), expected, rtol=1e-5, atol=2e-6)
