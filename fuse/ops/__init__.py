"""Tensor operations: an obvious torch reference of each, native code where there is some, and the choice of one."""

from __future__ import annotations

from fuse.ops import decode_attention, gae, logprob, sampling


def describe() -> dict[str, str]:
    """Which implementation serves each operation, and why."""
    return {
        "decode_attention": decode_attention.describe(),
        "gae": gae.describe(),
        "sample_tokens": sampling.describe(),
        "token_logprobs": logprob.describe(),
    }
