"""Sequences one after the other in one row, so that nothing is computed for padding: attention alone tells them apart.

A layer takes as long as its tokens: on a CPU core always, on a GPU where there are enough to keep it busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fuse.head_dim import head_dim
from fuse.intrastage.cost_profile import shape_of
from fuse.intrastage.fused_layers import has_known_layers
from fuse.intrastage.no_cache import NoCache
from fuse.intrastage.packed_attention import LEAST_HEAD_DIM, PACKED_ATTENTION, Sequences, packed_attention
from fuse.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The tokens of a micro-batch without its padding, [1, packed].

    places: [packed], of the tokens in the flattened [batch * tokens], in order.
    """

    sequences: Sequences
    places: Tensor

    @classmethod
    def of(cls, micro_batch: MicroBatch, model: PreTrainedModel) -> Packing | None:
        """None where the micro-batch is full, or is to pass through the model as it is laid out."""
        if not is_packed(micro_batch, model):
            return None
        assert micro_batch.lengths is not None
        sequences = Sequences.of(micro_batch.lengths, micro_batch.input_ids.device)
        width = micro_batch.input_ids.shape[1]
        return cls(sequences, sequences.rows.long() * width + sequences.positions)

    @property
    def position_ids(self) -> Tensor:
        """[1, packed]."""
        return self.sequences.positions.unsqueeze(0)

    def pack(self, values: Tensor) -> Tensor:
        """[batch, tokens] -> [1, packed]."""
        return values.flatten().index_select(0, self.places).unsqueeze(0)


def is_packed(micro_batch: MicroBatch, model: PreTrainedModel) -> bool:
    """Whether the micro-batch passes packed through a model."""
    lengths = micro_batch.lengths
    may_be = lengths is not None and shape_of(micro_batch).num_sequences < len(lengths)
    return may_be and model.config._attn_implementation == PACKED_ATTENTION


def can_pack(model: PreTrainedModel, device_type: str) -> bool:
    """Whether a model's layers are known to pass on to attention what it takes to tell packed sequences apart."""
    config = model.config.get_text_config()
    return (
        has_known_layers(model)
        and config._attn_implementation in ("sdpa", PACKED_ATTENTION)
        and (device_type == "cpu" or head_dim(config) >= LEAST_HEAD_DIM)
    )


def use_packing(model: PreTrainedModel, device_type: str) -> None:
    """Have a model's attention tell packed sequences apart, where it can on such a device."""
    if not can_pack(model, device_type):
        return
    ALL_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, packed_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)


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
        **({} if packing is None else {"sequences": packing.sequences}),
    ).last_hidden_state
    return output
