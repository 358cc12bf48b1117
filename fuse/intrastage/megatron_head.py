"""A vocabulary head that tensor-parallel ranks share, and the log-probabilities of tokens by it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuse.intrastage.communication import all_reduce_sum, naming


class VocabularyHead(nn.Module):
    """Maps hidden states [n, hidden] to logits [n, vocab], the same on every tensor-parallel rank.

    output_layer: a megatron-core ColumnParallelLinear.
    tied_embedding: the module whose weight it uses; None for its own.
    tensor_group: the tensor-parallel ranks, which call this at once.

    A loss that knows of shards takes `shard` and communicates less: see `vocab_parallel_logprobs`.
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


def vocab_parallel_logprobs(
    hidden: Tensor, head: VocabularyHead, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy in nats under softmax(head(hidden) / temperature), each [n] float32.

    As `fuse.ops.logprob.token_logprobs`, without any rank ever holding whole rows of logits; all ranks of the head's
    group call this at once and get the same. Differentiable in hidden and the head's weights through the
    log-probabilities; the entropy carries no gradient.

    hidden: [n, hidden]. targets: [n] int64 in [0, vocab).

    Raises: CommunicationError when a peer died or did not answer in time.
    """
    logits = head.shard(hidden).float() / temperature
    function: Any = _VocabParallelLogprobs
    logprobs, entropy = function.apply(logits, targets, head.tensor_group)
    return logprobs, entropy


class _GatheredVocabulary(torch.autograd.Function):
    """All ranks' logits side by side; megatron-core's own needs CUDA. Every rank goes on with the same, so its own
    part of the gradient is the whole one."""

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


class _VocabParallelLogprobs(torch.autograd.Function):
    """megatron-core's own cross-entropies cast gradients to bfloat16, or are bound to `parallel_state`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        width = logits.size(-1)
        local = targets - group.rank() * width
        is_here = (local >= 0) & (local < width)
        local = local.clamp(0, width - 1)
        shifted = logits - _maximum(logits.amax(-1), group)[:, None]
        weights = shifted.exp()
        target = shifted.gather(-1, local[:, None]).squeeze(-1) * is_here
        sums = torch.stack([weights.sum(-1), target, (weights * shifted).sum(-1)])
        if group.size() > 1:
            all_reduce_sum(sums, group, "partition functions over the vocabulary")
        partition, target, moment = sums
        ctx.save_for_backward(weights.div_(partition[:, None]), local, is_here)
        entropy = partition.log() - moment / partition
        ctx.mark_non_differentiable(entropy)
        return target - partition.log(), entropy

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor, None, None]:
        """d log p(target) / d logit = [logit is the target's] - p(logit)."""
        probabilities, local, is_here = ctx.saved_tensors
        gradient = probabilities.neg()
        gradient.scatter_add_(-1, local[:, None], is_here[:, None].to(gradient.dtype))
        return gradient * output_grads[0][:, None], None, None


def _maximum(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        with naming(f"rank {dist.get_rank()}: the maximum of logits over the vocabulary"):
            dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values
