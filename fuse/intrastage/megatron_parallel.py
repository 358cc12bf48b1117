"""What megatron-core's tensor-parallel layers compute, with gradients that can be deferred and errors that say where.

The layers keep their parameters and shapes; their forwards are replaced, because megatron-core defers an embedding's
weight gradients only, or by Transformer Engine, remembers autocast in backwards on CUDA only, and leaves a lost peer
to whatever torch.distributed says of it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn
from torch.nn import functional

from fuse.intrastage.communication import all_reduce_sum
from fuse.intrastage.split_backward import SplitBackward


def take_over_parallel_layers(
    model: nn.Module, split: SplitBackward, tensor_group: dist.ProcessGroup, what: str
) -> None:
    """Replace the forwards of `model`'s parallel layers by those below; products are `split`'s.

    tensor_group: the ranks that share the layers. what: names the model in errors.
    """
    for module in model.modules():
        untyped: Any = module
        if isinstance(module, ColumnParallelLinear):
            untyped.forward = functools.partial(_column_parallel, module, split, tensor_group)
        elif isinstance(module, RowParallelLinear):
            untyped.forward = functools.partial(_row_parallel, module, split, tensor_group, what)
        elif isinstance(module, VocabParallelEmbedding):
            untyped.forward = functools.partial(_embedding, module, tensor_group, what)


def _column_parallel(
    linear: Any, split: SplitBackward, group: dist.ProcessGroup, layer_input: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, None]:
    """[..., in] -> [..., out / ranks]: each rank has some rows of the weight, and the whole input.

    Returns, as megatron-core does, a bias beside the output, which is None here.
    """
    assert not linear.gather_output
    assert linear.bias is None or not linear.skip_bias_add
    weight = linear.weight if weight is None else weight
    return split.linear(layer_input, weight, linear.bias, group if group.size() > 1 else None), None


def _row_parallel(
    linear: Any, split: SplitBackward, group: dist.ProcessGroup, what: str, layer_input: Tensor
) -> tuple[Tensor, None]:
    """[..., in / ranks] -> [..., out]: each rank has some columns of the weight, and as many of the input."""
    assert linear.input_is_parallel
    assert linear.bias is None
    return _summed(split.linear(layer_input, linear.weight, None), group, what), None


def _embedding(embedding: Any, group: dist.ProcessGroup, what: str, token_ids: Tensor) -> Tensor:
    """[batch, tokens] -> [batch, tokens, hidden]: each rank has the embeddings of some of the vocabulary."""
    local = token_ids - embedding.vocab_start_index
    is_elsewhere = (local < 0) | (local >= embedding.num_embeddings_per_partition)
    found = functional.embedding(local.masked_fill(is_elsewhere, 0), embedding.weight)
    return _summed(found.masked_fill(is_elsewhere[..., None], 0.0), group, what)


def _summed(part: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    if group.size() == 1:
        return part
    function: Any = _Sum
    total: Tensor = function.apply(part, group, what)
    return total


class _Sum(torch.autograd.Function):
    """Sum over ranks, in place. All of them go on with the same, so the gradient of the sum is that of each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
        ctx.mark_dirty(part)
        all_reduce_sum(part, group, f"hidden states over the ranks that share {what}")
        return part

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor, None, None]:
        return output_grads[0], None, None
