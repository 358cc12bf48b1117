"""Log-probabilities of tokens, and the entropy of the distributions they were drawn from, out of hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy in nats under softmax(head(hidden) / temperature), each [n] float32.

    hidden: [n, hidden] of the head's dtype.
    head: maps [n, hidden] to logits [n, vocab].
    targets: [n] int64 in [0, vocab).
    chunk_tokens: rows of logits held at once; the backward pass then computes each chunk's logits again.
        None: all rows, once.

    Softmax and sums are float32 whatever the dtype of the logits. Differentiable in hidden and the head's weights.

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
    if chunk_tokens is None or len(targets) <= chunk_tokens:
        return _logprobs_and_entropy(hidden, head, targets, temperature)
    chunks = [
        checkpoint(_logprobs_and_entropy, rows, head, row_targets, temperature, use_reentrant=False)
        for rows, row_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _logprobs_and_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = (head(hidden).float() / temperature).log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def describe() -> str:
    """Which implementation serves, and why."""
    return "torch reference, in chunks of tokens on request: there is no native kernel"
