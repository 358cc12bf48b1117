"""Tensor operations: an obvious torch reference of each, native code where there is some, and the choice of one."""

from __future__ import annotations

from fuse.ops import gae, logprob


def describe() -> dict[str, str]:
    """Which implementation serves each operation, and why."""
    return {"gae": gae.describe(), "token_logprobs": logprob.describe()}
