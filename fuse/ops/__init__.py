"""Tensor operations: an obvious torch reference of each, native code where there is some, and the choice of one."""

from __future__ import annotations

from fuse.ops import (
    decode_attention,
    gae,
    kv_blocks,
    linear_logprob,
    logprob,
    quantized_linear,
    rms_norm,
    rotary,
    sampling,
    shaped_gae,
    skinny_linear,
    suffix_index,
    swiglu,
)


def describe() -> dict[str, str]:
    """Which implementation serves each operation, and why."""
    return {
        "decode_attention": decode_attention.describe(),
        "gae": gae.describe(),
        "kv_blocks": kv_blocks.describe(),
        "linear_logprob": linear_logprob.describe(),
        "quantized_linear": quantized_linear.describe(),
        "rms_norm": rms_norm.describe(),
        "rotary": rotary.describe(),
        "sample_tokens": sampling.describe(),
        "shaped_gae": shaped_gae.describe(),
        "skinny_linear": skinny_linear.describe(),
        "suffix_index": suffix_index.describe(),
        "swiglu": swiglu.describe(),
        "token_logprobs": logprob.describe(),
    }
