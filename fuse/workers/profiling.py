"""Micro-batches made up to measure stages on: they cost what real ones of their shape cost, and mean nothing."""

from __future__ import annotations

import torch

from fuse.intrastage.profile import Shape
from fuse.intrastage.stage import MicroBatch
from fuse.workers.micro_batches import PolicyTargets, ValueTargets


def made_up(shape: Shape, response_tokens: int) -> tuple[MicroBatch, MicroBatch]:
    """The actor's and the critic's micro-batch of sequences that end in so many response tokens, all of equal length.

    Losses record statistics of what is measured on them: drain and drop those.

    Raises:
        ValueError: the responses leave no prompt, or are empty.
    """
    if not 1 <= response_tokens < shape.num_tokens:
        raise ValueError(
            f"{response_tokens} response tokens in sequences of {shape.num_tokens}: "
            f"choose between 1 and {shape.num_tokens - 1}, so that there is a prompt"
        )
    input_ids = torch.zeros(shape.num_sequences, shape.num_tokens, dtype=torch.int64)
    positions = torch.arange(shape.size).view(shape.num_sequences, shape.num_tokens)
    head_index = positions[:, -response_tokens - 1 : -1].flatten()  # the token before each response token predicts it
    zeros, mask = torch.zeros(len(head_index)), torch.ones(len(head_index), dtype=torch.bool)
    policy = PolicyTargets(token_ids=torch.zeros_like(head_index), old_logprobs=zeros, advantages=zeros, mask=mask)
    value = ValueTargets(old_values=zeros, returns=zeros, mask=mask)
    return (
        MicroBatch(input_ids=input_ids, head_index=head_index, targets=policy),
        MicroBatch(input_ids=input_ids, head_index=head_index, targets=value),
    )
