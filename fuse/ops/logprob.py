"""Log-probabilities of tokens, and the entropy of the distributions they were drawn from, out of hidden states."""

from __future__ import annotations

from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuse.ops import linear_logprob as linear


@runtime_checkable
class SharedHead(Protocol):
    """A head that several processes hold parts of, and that makes log-probabilities by itself."""

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, num_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        """As the function of this name, in all of the processes at once."""
        ...


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int | None = None,
    *,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy in nats under softmax(head(hidden) / temperature), each [n] float32.

    hidden: [n, hidden] of the head's dtype.
    head: maps [n, hidden] to logits [n, vocab]. Of a plain nn.Linear only the parameters are used: its logits are
        never held side by side, see `fuse.ops.linear_logprob`. Or a `SharedHead`.
    targets: [n] int64 in [0, vocab).
    num_tokens: the softmax is over so many, the first; None for all. The rest pads the vocabulary.
    chunk_tokens: rows of any other head's logits held at once; the backward pass then computes each chunk's logits
        again. None: all rows, once.

    Softmax and sums are float32 whatever the dtype of the logits, or float64 for float64. Differentiable in hidden and
    the head's weights.

    Raises: ValueError on shapes that do not fit, a temperature that is not positive, or an empty chunk.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and targets {list(targets.shape)}: pass [n, hidden] and one target per row"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}: it must be positive; add 1e-7 to allow for 0")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: it must be at least 1, or None for no chunks")
    if isinstance(head, SharedHead):
        return head.token_logprobs(hidden, targets, temperature, num_tokens)
    if _is_plain(head):
        bias = None if head.bias is None else head.bias[:num_tokens]
        return linear.linear_logprob(hidden, head.weight[:num_tokens], bias, targets, temperature)
    if chunk_tokens is None or len(targets) <= chunk_tokens:
        return _logprobs_and_entropy(hidden, head, targets, temperature, num_tokens)
    chunks = [
        checkpoint(_logprobs_and_entropy, rows, head, row_targets, temperature, num_tokens, use_reentrant=False)
        for rows, row_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _logprobs_and_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float, num_tokens: int | None
) -> tuple[Tensor, Tensor]:
    return linear.of_logits(head(hidden)[:, :num_tokens], targets, temperature)


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the head computes a product with its weight, and nobody counts on being called when it does."""
    has_hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head) is nn.Linear and not has_hooks and not hasattr(head, "_hf_hook")  # accelerate's


def describe() -> str:
    """Which implementation serves, and why."""
    return f"plain linear heads: {linear.describe()}; other heads: torch reference, in chunks of tokens on request"
