"""A vocabulary head that tensor-parallel ranks share, and the log-probabilities of tokens by it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuse.intrastage.communication import all_reduce_sum, naming
from fuse.ops.linear_logprob import VocabularyShard, linear_logprob


class VocabularyHead(nn.Module):
    """Maps hidden states [n, hidden] to logits [n, vocab], the same on every tensor-parallel rank.

    output_layer: a megatron-core ColumnParallelLinear.
    tied_embedding: the module whose weight it uses; None for its own.
    tensor_group: the tensor-parallel ranks, which call this at once.

    Log-probabilities of tokens take less communication than logits: see `token_logprobs`.
    """

    def __init__(
        self, output_layer: nn.Module, tied_embedding: nn.Module | None, tensor_group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.output_layer = output_layer
        self.tied_embedding = tied_embedding
        self.tensor_group = tensor_group

    def forward(self, hidden: Tensor) -> Tensor:
        if self.tensor_group.size() == 1:
            return self.shard(hidden)
        function: Any = _GatheredVocabulary
        logits: Tensor = function.apply(self.shard(hidden), self.tensor_group)
        return logits

    def shard(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab / ranks] of this rank's part of the vocabulary."""
        weight = None if self.tied_embedding is None else self.tied_embedding.weight
        logits: Tensor = self.output_layer(hidden, weight=weight)[0]
        return logits

    @property
    def parameters_of_shard(self) -> tuple[Tensor, Tensor | None]:
        """Weight [vocab / ranks, hidden] and bias [vocab / ranks] of `shard`."""
        owner: Any = self.output_layer if self.tied_embedding is None else self.tied_embedding
        bias: Tensor | None = getattr(self.output_layer, "bias", None)
        return owner.weight, bias

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, temperature: float, num_tokens: int | None
    ) -> tuple[Tensor, Tensor]:
        """As `fuse.ops.logprob.token_logprobs`, without any rank ever holding rows of logits.

        All tensor-parallel ranks call this at once and get the same.

        Raises: CommunicationError when a peer died or did not answer in time.
        """
        weight, bias = self.parameters_of_shard
        group = self.tensor_group
        shard, first_token = None, group.rank() * len(weight)
        if num_tokens is not None:
            own = num_tokens - first_token
            if own < 1:
                raise ValueError(
                    f"{num_tokens} tokens leave nothing but padding to one of {group.size()} tensor-parallel ranks, "
                    f"which have {len(weight)} each: use fewer"
                )
            weight, bias = weight[:own], None if bias is None else bias[:own]
        if group.size() > 1:
            shard = VocabularyShard(
                first_token=first_token,
                take_maximum=lambda tensor: _take_maximum(tensor, group),
                take_sum=lambda tensor: all_reduce_sum(tensor, group, "partition functions over the vocabulary"),
            )
        return linear_logprob(hidden, weight, bias, targets, temperature, shard=shard)


def _take_maximum(values: Tensor, group: dist.ProcessGroup) -> None:
    with naming(f"rank {dist.get_rank()}: the maximum of logits over the vocabulary"):
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)


class _GatheredVocabulary(torch.autograd.Function):
    """All ranks' logits side by side; megatron-core's own needs CUDA.

    Every rank goes on with the same logits, so it has the whole gradient of its own part.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        shards = [torch.empty_like(logits) for _ in range(group.size())]
        with naming(f"rank {dist.get_rank()}: gathering logits over the vocabulary"):
            dist.all_gather(shards, logits.contiguous(), group=group)
        return torch.cat(shards, dim=-1)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor, None]:
        return output_grads[0].chunk(ctx.group.size(), dim=-1)[ctx.group.rank()].contiguous(), None
