"""Attention of one new token per row over a cache of ragged lengths: the inner loop of decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from fuse.ops.native import choose, described, log_choice

NATIVE_DTYPES = (torch.float32,)


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, slots: Tensor | None = None
) -> Tensor:
    """softmax(scale * query . keys) . values over each row's first lengths[row] tokens, [rows, heads, head_dim].

    query: [rows, heads, head_dim]. keys, values: [rows, kv_heads, context, head_dim], views of a cache are welcome;
    heads that share a key head are neighbours. lengths: int64 [rows], 1 to context. No gradient flows.
    slots: where the rows' keys and values are, int64 [rows]; then keys and values have any number of slots for rows.

    The native code reads the rows' own tokens only. The reference reads the whole context, so all of it must be finite.
    """
    native, choice = choose(query.device, query.dtype, NATIVE_DTYPES)
    log_choice("decode_attention", choice)
    if native is None:
        return decode_attention_reference(query, keys, values, lengths, scale, slots)
    head_dim = query.shape[2]
    for tensor in (query[:, :, None], keys, values):
        assert tensor.shape[3] == head_dim, f"head sizes differ: {list(tensor.shape)} and {head_dim}"
        assert tensor.stride(3) == 1, f"a head's elements must be contiguous: strides {tensor.stride()}"
    for cache in (keys, values):
        assert cache.stride(2) == head_dim, f"tokens must follow one another: strides {cache.stride()}"
    output = query.new_empty(query.shape)
    slots = None if slots is None else slots.contiguous()
    native.decode_attention(query, keys, values, lengths.contiguous(), slots, scale, output)
    return output


def decode_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float, slots: Tensor | None = None
) -> Tensor:
    """`decode_attention` by torch's fused attention and a mask."""
    if slots is not None:
        keys, values = keys[slots], values[slots]
    return masked_attention(query, keys, values, additive_mask(lengths, keys.shape[2], query.dtype), scale)


def additive_mask(lengths: Tensor, context: int, dtype: torch.dtype) -> Tensor:
    """0 where a row has a token, -inf elsewhere: [rows, 1, 1, context]."""
    is_token = torch.arange(context, device=lengths.device) < lengths.unsqueeze(1)
    mask = torch.full(is_token.shape, float("-inf"), dtype=dtype, device=lengths.device).masked_fill_(is_token, 0.0)
    return mask[:, None, None, :]


def masked_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`decode_attention_reference` with its additive mask, [rows, 1, 1, context].

    With one token per row, the heads that share a key head are as good as tokens that share it: the groups become the
    query axis. Repeating every key and value instead, as is usual, takes ten times as long at a context of 512.
    """
    rows, heads, head_dim = query.shape
    grouped = query.reshape(rows, keys.shape[1], heads // keys.shape[1], head_dim)
    output = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return output.reshape(rows, heads, values.shape[3])


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether native code serves: then a mask need not be built."""
    return choose(device, dtype, NATIVE_DTYPES)[0] is not None


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described("native C++ for float32 on CPU", "torch's fused attention elsewhere")


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose(example.device, example.dtype, NATIVE_DTYPES)[1]
