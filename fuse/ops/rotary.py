"""Rotary position embedding of queries and keys, with one pass forward and one backward, and only its angles kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fuse.ops.native import call, choose, described, log_choice

NATIVE_DTYPES = (torch.float32,)


def rotary(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The halves (a, b) of every head, turned by its token's angle: (a cos - b sin, b cos + a sin).

    states: [batch, heads, tokens, head_dim]; the result has the same shape, and lies in memory token after token.
    cosines, sines: [batch or 1, tokens, head_dim], of the same type. Differentiable once, in the states.
    """
    apply: Any = _Rotary.apply
    output: Tensor = apply(states, cosines, sines)
    return output


def rotary_reference(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`rotary` as the definition has it."""
    first, second = states.chunk(2, dim=-1)
    return states * cosines.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sines.unsqueeze(1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        native, choice = choose(states.device, states.dtype, NATIVE_DTYPES)
        log_choice("rotary", choice)
        ctx.save_for_backward(cosines, sines)
        if native is None:
            return rotary_reference(states, cosines, sines)
        return _turned(native.rotary, states, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        native, _ = choose(output_grad.device, output_grad.dtype, NATIVE_DTYPES)
        if native is not None:
            return _turned(native.rotary_backward, output_grad, cosines, sines), None, None
        first, second = (output_grad * sines.unsqueeze(1)).chunk(2, dim=-1)
        return output_grad * cosines.unsqueeze(1) + torch.cat((second, -first), dim=-1), None, None


def _turned(turn: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    by_token = states.detach().transpose(1, 2).contiguous()
    output = torch.empty_like(by_token)
    angles = (one.detach().reshape(-1, one.shape[-1]) for one in (cosines, sines))
    call(turn, by_token.flatten(0, 1), *angles, output.flatten(0, 1))
    return output.transpose(1, 2)


def describe() -> str:
    """Which implementation serves which input, and why."""
    return described("native C++ for float32 on CPU", "torch elsewhere")


def implementation(example: Tensor) -> str:
    """Which implementation serves inputs of the dtype and device of `example`."""
    return choose(example.device, example.dtype, NATIVE_DTYPES)[1]
