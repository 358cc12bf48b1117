"""One forward over tokens whose keys and values go to slots: a decode step, a draft's, or a verification."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuse.engines.attention import decode_mask
from fuse.engines.slot_cache import SlotCache
from fuse.ops.decode_attention import is_native


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Tokens that a forward takes side by side, of one row or of several.

    token_ids: int64 [tokens]. positions: in their rows, int64 [tokens], where their keys and values go; they attend to
    all up to themselves, those of this very forward included.
    slots: of their rows, int64 [tokens]; None for one token of each row, in order.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor | None = None


class Decoder:
    """A causal language model over a cache of slots.

    has_slot_attention: the model's attention is `slot_attention`. num_tokens: that its logits are for, the first of
    the vocabulary; None for all.
    """

    def __init__(
        self, model: PreTrainedModel, cache: SlotCache, *, has_slot_attention: bool, num_tokens: int | None
    ) -> None:
        self.model, self.cache, self.num_tokens = model, cache, num_tokens
        self._has_slot_attention = has_slot_attention
        self._is_native = has_slot_attention and is_native(model.dtype, model.device)

    def of(self, model: PreTrainedModel) -> Decoder:
        """The same of another model, with attention like this one's."""
        return Decoder(model, self.cache, has_slot_attention=self._has_slot_attention, num_tokens=self.num_tokens)

    @torch.inference_mode()
    def logits(self, inputs: Inputs, context: int, num_rows: int) -> Tensor:
        """Of the token that follows each input, [tokens, vocab]. All rows' tokens are among the first `context`."""
        mask = decode_mask(inputs.positions + 1, context, self.model.dtype, native=self._is_native, slots=inputs.slots)
        self.cache.begin_decode(inputs.positions, context, num_rows, slots=inputs.slots, gathers=not self._is_native)
        output = self.model(
            input_ids=inputs.token_ids.unsqueeze(1),
            attention_mask=mask,
            position_ids=inputs.positions.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, 0, : self.num_tokens]
        return logits
