"""Backwards in two halves: input gradients now (I), weight gradients of linear layers later (W), nothing twice.

A linear layer of a model prepared by `SplitBackward` computes what nn.Linear does. The product that is its weight's
gradient is added to what is there as it is made, so that a micro-batch costs no pass over all gradients. Inside
`deferred` its backward returns the gradient of its input alone, and keeps layer input and output gradient for that
product. Other parameters (norms, embeddings, layers of other kinds) get their gradients in I, which costs next to
nothing. So does a vocabulary head whose logits `fuse.ops.linear_logprob` reduces, at some cost: to defer its gradient,
logits would have to be held, or computed once more. Where tensor-parallel ranks add up input gradients, they do so in
I. Under gradient checkpointing I recomputes and W does not; each layer's last linear is recomputed too, where autograd
would stop short.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from fuse.intrastage.communication import naming


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """A linear layer's part of W. layer_input: [..., in]; output_grad: [..., out], both in the type of the product."""

    weight: Tensor
    bias: Tensor | None
    layer_input: Tensor
    output_grad: Tensor

    def add(self) -> None:
        """Add the gradients of weight and bias to theirs."""
        rows = self.output_grad.reshape(-1, self.output_grad.shape[-1])
        if self.weight.requires_grad:
            add_product(self.weight, rows.t(), self.layer_input.reshape(-1, self.layer_input.shape[-1]))
        if self.bias is not None and self.bias.requires_grad:
            gradient = rows.sum(0).to(self.bias.dtype)
            self.bias.grad = gradient if self.bias.grad is None else self.bias.grad.add_(gradient)


class SplitBackward:
    """Takes over the nn.Linear layers of `model`, so that their weight gradients can be deferred.

    Layers of other kinds that are a product with a weight can call `linear` for it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._pending: deque[WeightGradient] | None = None
        for module in model.modules():
            if type(module) is nn.Linear:  # a subclass may compute something else
                untyped: Any = module
                untyped.forward = functools.partial(self._forward, module)

    @contextmanager
    def deferred(self) -> Iterator[deque[WeightGradient]]:
        """Backwards in the body leave weight gradients out and list them here instead, the last layer's first."""
        assert self._pending is None, "backwards run one at a time"
        pending: deque[WeightGradient] = deque()
        self._pending = pending
        try:
            yield pending
        finally:
            self._pending = None

    def defer(self, gradient: WeightGradient) -> bool:
        """Whether the gradient was put off; if not, it is wanted now."""
        if self._pending is None:
            return False
        self._pending.append(gradient)
        return True

    def linear(
        self, layer_input: Tensor, weight: Tensor, bias: Tensor | None, tensor_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """layer_input [..., in], weight [out, in], bias [out] -> [..., out].

        weight, bias: parameters themselves, for their gradients are added to them.
        tensor_group: ranks that each have other rows of the weight and the same input, whose gradient they add up.
        """
        if not torch.is_grad_enabled():
            return functional.linear(layer_input, weight, bias)
        apply: Any = _Linear.apply
        result: Tensor = apply(layer_input, weight, bias, self, tensor_group)
        return result

    def _forward(self, linear: nn.Linear, layer_input: Tensor) -> Tensor:
        return self.linear(layer_input, linear.weight, linear.bias)


def add_all(gradients: deque[WeightGradient]) -> None:
    """W: add every gradient in the list, and let go of what it held."""
    while gradients:
        gradients.popleft().add()


class _Linear(torch.autograd.Function):
    """nn.Linear, autocast included: autograd cannot see into it, so it casts and multiplies as autocast would."""

    @staticmethod
    def forward(
        ctx: Any,
        layer_input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        split: SplitBackward,
        tensor_group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.split, ctx.tensor_group = weight, bias, split, tensor_group
        ctx.input_dtype, parameter = layer_input.dtype, weight
        device = layer_input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            layer_input, weight = layer_input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        # Not the cast weight: every micro-batch under way would hold a copy of the stage.
        ctx.save_for_backward(layer_input, parameter)
        return functional.linear(layer_input, weight, bias)

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        layer_input, parameter = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        input_grad = reduction = None
        if wants_input:
            rows = output_grad.reshape(-1, output_grad.shape[-1])
            input_grad = rows.mm(parameter.to(rows.dtype)).view_as(layer_input)
            if ctx.tensor_group is not None:
                with _naming_reduction():
                    reduction = dist.all_reduce(input_grad, group=ctx.tensor_group, async_op=True)
        if wants_weight or wants_bias:
            # Detached, or it would keep the graph behind it alive until W.
            gradient = WeightGradient(ctx.weight, ctx.bias, layer_input.detach(), output_grad)
            if not ctx.split.defer(gradient):
                gradient.add()
        if reduction is not None:
            with _naming_reduction():
                reduction.wait()
        if input_grad is not None:
            input_grad = input_grad.to(ctx.input_dtype)
        return input_grad, None, None, None, None


def _naming_reduction() -> AbstractContextManager[None]:
    return naming(f"rank {dist.get_rank()}: summing input gradients of a layer that ranks share")


def add_product(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left right, [rows, n] and [n, columns], to the parameter's gradient."""
    if parameter.grad is None:
        parameter.grad = left.mm(right).to(parameter.dtype)
    elif parameter.dtype == left.dtype:
        parameter.grad.addmm_(left, right)
    else:
        parameter.grad.add_(left.mm(right))
