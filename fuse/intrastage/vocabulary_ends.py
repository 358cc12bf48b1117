"""Embedding and head of a stage that trains: gradients of their large weights are added where they are.

Autograd makes a gradient of the whole vocabulary for every micro-batch, and adds it up in a pass over all of it: more
memory than a small micro-batch takes, and a good part of its time. Here a micro-batch touches the rows of its own
tokens in the embedding, and the products of the head's chunks add to what is there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fuse.ops.linear_logprob import linear_logprob


def embed(embedding: nn.Module, input_ids: Tensor) -> Tensor:
    """What the module says of the tokens; [batch, tokens] -> [batch, tokens, hidden]."""
    if torch.is_grad_enabled() and _is_plain_embedding(embedding):
        apply: Any = _Embedding.apply
        embedded: Tensor = apply(input_ids, embedding.weight, embedding.padding_idx)
        return embedded
    said: Tensor = embedding(input_ids)
    return said


def add_gradients_of(head: nn.Module) -> None:
    """Have a plain linear head make log-probabilities so, as `fuse.ops.logprob.SharedHead`; others stay as they are."""
    if type(head) is nn.Linear:
        untyped: Any = head
        untyped.token_logprobs = functools.partial(_token_logprobs, head)


def _token_logprobs(
    head: nn.Linear, hidden: Tensor, targets: Tensor, temperature: float, num_tokens: int | None
) -> tuple[Tensor, Tensor]:
    bias = None if head.bias is None else head.bias[:num_tokens]
    return linear_logprob(hidden, head.weight[:num_tokens], bias, targets, temperature, adds_to=head.weight)


def _is_plain_embedding(module: nn.Module) -> bool:
    """Whether it looks rows up and nothing else. On GPUs adding rows would be in any order, from run to run."""
    return (
        type(module) is nn.Embedding
        and module.weight.device.type == "cpu"
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return functional.embedding(input_ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[None, None, None]:
        (input_ids,) = ctx.saved_tensors
        weight = ctx.weight
        if ctx.needs_input_grad[1]:
            rows, gradients = input_ids.flatten(), output_grad.flatten(0, -2).to(weight.dtype)
            if ctx.padding_idx is not None:
                gradients = gradients.masked_fill((rows == ctx.padding_idx)[:, None], 0.0)
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, rows, gradients)
        return None, None, None
