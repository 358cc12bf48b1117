"""Sequences one after the other in one row, so that nothing is computed for padding: attention alone tells them apart.

On a CPU core a layer takes as long as its tokens, and a loop over sequences next to nothing; on a GPU neither is so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuse.intrastage.cost_profile import shape_of
from fuse.intrastage.fused_layers import has_known_layers
from fuse.intrastage.no_cache import NoCache
from fuse.micro_batch import MicroBatch

PACKED_ATTENTION = "fuse_packed"


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The tokens of a micro-batch without its padding, [1, packed].

    lengths: of its sequences. places: of the tokens in the flattened [batch * tokens], in order. width: of a row there.
    """

    lengths: Sequence[int]
    places: Tensor
    width: int

    @classmethod
    def of(cls, micro_batch: MicroBatch, model: PreTrainedModel) -> Packing | None:
        """None where the micro-batch is full, or is to pass through the model as it is laid out."""
        lengths, width = micro_batch.lengths, micro_batch.input_ids.shape[1]
        if lengths is None or shape_of(micro_batch).num_sequences == len(lengths):
            return None
        if model.config._attn_implementation != PACKED_ATTENTION or not micro_batch.input_ids.is_cpu:
            return None
        places = torch.cat([torch.arange(length) + row * width for row, length in enumerate(lengths)])
        return cls(lengths, places, width)

    @property
    def position_ids(self) -> Tensor:
        """[1, packed]."""
        return (self.places % self.width).unsqueeze(0)

    def pack(self, values: Tensor) -> Tensor:
        """[batch, tokens] -> [1, packed]."""
        return values.flatten().index_select(0, self.places).unsqueeze(0)


def can_pack(model: PreTrainedModel) -> bool:
    """Whether a model's layers are known to pass on to attention what it takes to tell packed sequences apart."""
    return has_known_layers(model) and model.config._attn_implementation in ("sdpa", PACKED_ATTENTION)


def use_packing(model: PreTrainedModel) -> None:
    """Have a model's attention tell packed sequences apart, where it can."""
    if not can_pack(model):
        return
    ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function in the sense of transformers: causal within each of the sequences of these lengths.

    Shapes: query, key and value [1, heads, tokens, head_dim]; the result is [1, tokens, heads, head_dim]. Without
    lengths it is transformers' own for sdpa.
    """
    if sequence_lengths is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    lengths = list(sequence_lengths)
    outputs = [
        sdpa_attention_forward(module, *states, attention_mask=None, **options)[0]
        for states in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def token_ids(micro_batch: MicroBatch, packing: Packing | None) -> Tensor:
    """Those that pass through the model: [batch, tokens] or [1, packed]."""
    return micro_batch.input_ids if packing is None else packing.pack(micro_batch.input_ids)


def selected(hidden: Tensor, micro_batch: MicroBatch, packing: Packing | None) -> Tensor:
    """Of what passed through the model, [batch, tokens, hidden] or [1, packed, hidden], the rows that the head sees."""
    if packing is None:
        return micro_batch.selected(hidden)
    return hidden[0].index_select(0, torch.searchsorted(packing.places, micro_batch.head_index))


def last_hidden_state(base: Any, hidden: Tensor, micro_batch: MicroBatch, packing: Packing | None) -> Tensor:
    """What a base model makes of hidden states, in their shape: [batch, tokens, hidden] or [1, packed, hidden]."""
    plain = micro_batch.attention_mask is None
    output: Tensor = base(
        inputs_embeds=hidden,
        attention_mask=micro_batch.attention_mask,
        position_ids=micro_batch.position_ids if packing is None else packing.position_ids,
        past_key_values=NoCache() if plain else None,
        use_cache=False,
        **({} if packing is None else {"sequence_lengths": packing.lengths}),
    ).last_hidden_state
    return output
