"""Log-probabilities and entropies of a linear head's distributions, without their logits side by side.

Logits are computed a chunk of tokens and vocabulary at a time (torch's matrix product), and each chunk is reduced at
once to four numbers per token (native code, one pass). The backward pass computes each chunk again and turns it into
its own gradient in place (one pass more), which costs one matrix product on top of the three that plain torch needs.

Source: the online softmax of Milakov and Gimelshein (arXiv 1805.02867); the chunks and the second computation as in
Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (arXiv 2411.09009), without its gradient filter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fuse.ops.logit_chunk import LOWEST, accumulate, accumulation_dtype, choose_for, differentiate, rescale
from fuse.ops.native import described, log_choice

CHUNK_TOKENS = 1024
"""The most tokens of a chunk: enough for matrix products at full speed."""

CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits of a chunk: on CPU it stays in cache between product and pass; a GPU wants launches to be worth it."""

_COLUMN_STEP = 1024  # kLogprobBlock of the native code: other multiples give the same bits


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """This rank's part of a vocabulary that several ranks share.

    first_token: the token of the weight's first row.
    take_maximum, take_sum: replace a tensor's elements by their maximum or sum over the ranks, in place.
    """

    first_token: int
    take_maximum: Callable[[Tensor], None]
    take_sum: Callable[[Tensor], None]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    *,
    shard: VocabularyShard | None = None,
    chunk: tuple[int, int] | None = None,
    adds_to: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy in nats under softmax((hidden weight^T + bias) / temperature).

    hidden: [n, hidden]. weight: [vocab, hidden]. bias: [vocab] or None. targets: [n] int64 in [0, vocab).
    shard: weight and bias are a part of the vocabulary; all its ranks call this at once, with the same hidden states
        and targets, and get the same results. Their gradients of `hidden` are summed.
    chunk: tokens and vocabulary entries of a chunk of logits; by default, see CHUNK_TOKENS and CHUNK_LOGITS.
    adds_to: the parameter that `weight` is, or the first rows of: the backward adds to its `grad` by itself, chunk by
        chunk, and autograd learns of no gradient of it.

    Returns both [n], float32, or float64 for float64 inputs. Differentiable, once, in hidden, weight and bias. Products
    are in the inputs' dtype or autocast's, sums and softmax in float32 or better. Holds two chunks at most beyond the
    results and gradients.

    Raises: ValueError on shapes that do not fit, a temperature that is not positive, or targets out of range.
    """
    _check(hidden, weight, bias, targets, temperature, shard)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    log_choice("linear_logprob", choose_for(hidden.device, dtype)[1])
    targets = targets.contiguous()
    head = _Head(dtype, temperature, shard, chunk or chunk_shape(len(hidden), device), adds_to)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (hidden, weight, bias)):
        apply: Any = _LinearLogprob.apply
        logprobs, entropy = apply(hidden, weight, bias, targets, head)
        return logprobs, entropy
    statistics, _ = head.statistics(hidden, weight, bias, targets)
    return head.results(statistics)


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`linear_logprob` as the definition has it, all logits side by side."""
    return of_logits(functional.linear(hidden, weight, bias), targets, temperature)


def of_logits(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies under softmax(logits / temperature), [n]; logits: [n, vocab]."""
    logprobs = (logits.to(accumulation_dtype(logits.dtype)) / temperature).log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def describe() -> str:
    """Which implementation serves which input, and why."""
    reduced = described(
        "native C++ for float32, bfloat16 and float64 on CPU",
        "torch for other dtypes",
        on_gpus="CUDA for float32 and bfloat16 on GPUs",
    )
    return f"chunks of logits, reduced by {reduced}"


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose_for(example.device, example.dtype)[1]


@dataclass(frozen=True, slots=True)
class _Head:
    """How chunks are computed. dtype: of the matrix products; chunk: tokens and vocabulary entries of one."""

    dtype: torch.dtype
    temperature: float
    shard: VocabularyShard | None
    chunk: tuple[int, int]
    adds_to: Tensor | None

    def statistics(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Statistics of the whole vocabulary, float64 [4, n], as `fuse.ops.logit_chunk` has them.

        And the logits, where one chunk held them all.
        """
        hidden = hidden.to(self.dtype)
        statistics = torch.zeros(4, len(hidden), dtype=torch.float64, device=hidden.device)
        statistics[0] = LOWEST
        logits = None
        buffer = self.buffer(hidden, len(weight))
        for columns, weight_chunk, bias_chunk in self.vocabulary_chunks(weight, bias):
            for rows in _slices(len(hidden), self.chunk[0]):
                logits = _logits(hidden[rows], weight_chunk, bias_chunk, buffer)
                accumulate(
                    logits, targets[rows], self.first_token + columns.start, self.temperature, statistics[:, rows]
                )
        if self.shard is not None:
            _merge(statistics, self.temperature, self.shard)
        return statistics, logits if logits is not None and logits.shape == (len(hidden), len(weight)) else None

    def results(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [n]."""
        maximum, total, moment, target = statistics
        log_total = total.log()
        logprobs = (target - maximum) / self.temperature - log_total
        dtype = accumulation_dtype(self.dtype)
        return logprobs.to(dtype), (log_total - moment / total).to(dtype)

    def vocabulary_chunks(self, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Columns, and the rows of weight and bias that belong to them, in the dtype of the products."""
        for columns in _slices(len(weight), self.chunk[1]):
            yield columns, weight[columns].to(self.dtype), None if bias is None else bias[columns].to(self.dtype)

    def buffer(self, hidden: Tensor, vocab_size: int) -> Tensor:
        """Room for a chunk of logits."""
        return hidden.new_empty(min(self.chunk[0], len(hidden)) * min(self.chunk[1], vocab_size), dtype=self.dtype)

    @property
    def first_token(self) -> int:
        return 0 if self.shard is None else self.shard.first_token


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: _Head
    ) -> tuple[Tensor, Tensor]:
        statistics, logits = head.statistics(hidden, weight, bias, targets)
        ctx.save_for_backward(hidden, weight, bias, targets, statistics)
        ctx.head = head
        ctx.logits = logits  # for one backward, which overwrites them
        ctx.set_materialize_grads(False)
        return head.results(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, statistics = ctx.saved_tensors
        kept, ctx.logits = ctx.logits, None
        grads = torch.zeros_like(statistics[:2])
        for row, grad in zip(grads, (logprob_grad, entropy_grad), strict=True):
            if grad is not None:
                row.copy_(grad)
        with torch.autocast(hidden.device.type, enabled=False):
            return *_gradients(ctx, hidden, weight, bias, targets, statistics, grads, kept), None, None


def _gradients(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: Tensor,
    grads: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias, where they are wanted. kept: all logits, if there is but one chunk of them."""
    head: _Head = ctx.head
    wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    dtype = accumulation_dtype(head.dtype)
    hidden_grad = torch.zeros_like(hidden, dtype=dtype) if wants_hidden else None
    weight_grad = _weight_grad(weight, head.adds_to) if wants_weight else None
    bias_grad = torch.zeros_like(bias, dtype=dtype) if wants_bias and bias is not None else None
    inputs = hidden.to(head.dtype)
    buffer = head.buffer(inputs, len(weight)) if kept is None else None
    for columns, weight_chunk, bias_chunk in head.vocabulary_chunks(weight, bias):
        chunk_grad = (
            None
            if weight_grad is None
            else _ProductSum(weight_grad[columns], head.dtype, adds=head.adds_to is not None)
        )
        for rows in _slices(len(inputs), head.chunk[0]):
            logits = kept if buffer is None else _logits(inputs[rows], weight_chunk, bias_chunk, buffer)
            assert logits is not None
            first_token = head.first_token + columns.start
            differentiate(logits, targets[rows], first_token, head.temperature, statistics[:, rows], grads[:, rows])
            if hidden_grad is not None:
                _add_product(hidden_grad[rows], logits, weight_chunk)
            if chunk_grad is not None:
                chunk_grad.add(logits.t(), inputs[rows])
            if bias_grad is not None:
                bias_grad[columns] += logits.sum(0, dtype=dtype)
        if chunk_grad is not None:
            chunk_grad.finish()
    if hidden_grad is not None and head.shard is not None:
        head.shard.take_sum(hidden_grad)
    return (
        None if hidden_grad is None else hidden_grad.to(hidden.dtype),
        weight_grad if head.adds_to is None else None,
        None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
    )


def _weight_grad(weight: Tensor, adds_to: Tensor | None) -> Tensor:
    """Where the gradient of `weight` is written, or added."""
    if adds_to is None:
        return torch.empty_like(weight)
    if adds_to.grad is None:
        adds_to.grad = torch.zeros_like(adds_to)
    return adds_to.grad[: len(weight)]


class _ProductSum:
    """A sum of matrix products, at least in float32, written or added to `out` at the end."""

    def __init__(self, out: Tensor, dtype: torch.dtype, *, adds: bool) -> None:
        self._out, self._adds = out, adds
        self._is_exact = out.dtype == dtype == accumulation_dtype(dtype)
        self._sum: Tensor | None = out if adds and self._is_exact else None

    def add(self, left: Tensor, right: Tensor) -> None:
        if self._sum is not None:
            _add_product(self._sum, left, right)
        elif self._is_exact:
            self._sum = torch.mm(left, right, out=self._out)
        else:
            self._sum = torch.mm(left, right).to(accumulation_dtype(left.dtype))

    def finish(self) -> None:
        if self._sum is None:
            if not self._adds:
                self._out.zero_()
        elif not self._is_exact:
            self._out.copy_(self._out + self._sum if self._adds else self._sum)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right"""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left.mm(right)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    out = buffer[: len(hidden) * len(weight)].view(len(hidden), len(weight))
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def _merge(statistics: Tensor, temperature: float, shard: VocabularyShard) -> None:
    """Statistics of this rank's part of the vocabulary become those of the whole."""
    maximum = statistics[0].clone()
    shard.take_maximum(statistics[0])
    rescale(statistics[1], statistics[2], (maximum - statistics[0]) / temperature)
    shard.take_sum(statistics[1:])


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def chunk_shape(num_tokens: int, device: str) -> tuple[int, int]:
    """Tokens and vocabulary entries of a chunk of logits."""
    tokens = max(1, min(num_tokens, CHUNK_TOKENS))
    logits = CHUNK_LOGITS["cpu" if device == "cpu" else "cuda"]
    return tokens, max(1, logits // tokens // _COLUMN_STEP) * _COLUMN_STEP


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    shard: VocabularyShard | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}: pass [n, hidden] and [vocab, hidden]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)} and weight {list(weight.shape)}: the head has one per token")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets is {list(targets.shape)} {targets.dtype} and hidden {list(hidden.shape)}: "
            "pass one int64 target per row"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be positive; add 1e-7 to allow for 0")
    # Looking at them on a GPU would wait for it.
    if shard is None and targets.device.type == "cpu" and len(targets):
        lowest, highest = (int(bound) for bound in targets.aminmax())
        if lowest < 0 or highest >= len(weight):
            raise ValueError(f"targets run from {lowest} to {highest}: they must lie in the head's [0, {len(weight)})")
