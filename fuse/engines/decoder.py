"""One forward over tokens whose keys and values go to slots: a decode step, a draft's, or a verification."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fuse.engines.attention import decode_mask
from fuse.engines.inputs import Inputs
from fuse.engines.native_llama import NativeLlama, is_served_in_place
from fuse.engines.slot_cache import SlotCache
from fuse.engines.window import Window
from fuse.ops.decode_attention import is_native
from fuse.ops.native import log_choice

MOST_NATIVE_TOKENS, NARROW_HIDDEN = 32, 1024
"""Side by side, up to which native code is faster than torch's products and what lies between them; twice as many of
models up to that hidden size."""


class Decoder:
    """A causal language model over a cache of slots.

    has_slot_attention: the model's attention is `slot_attention`. num_tokens: that its logits are for, the first of
    the vocabulary; None for all.

    A few tokens pass through a Llama on a CPU core by native code in one call, all others through the model's modules.
    """

    def __init__(
        self, model: PreTrainedModel, cache: SlotCache, *, has_slot_attention: bool, num_tokens: int | None
    ) -> None:
        self.model, self.cache, self.num_tokens = model, cache, num_tokens
        self._has_slot_attention = has_slot_attention
        self._is_native = has_slot_attention and is_native(model.dtype, model.device)
        self._is_served = has_slot_attention and is_served_in_place(model)
        self._native: NativeLlama | None = None

    def of(self, model: PreTrainedModel) -> Decoder:
        """The same of another model, with attention like this one's."""
        return Decoder(model, self.cache, has_slot_attention=self._has_slot_attention, num_tokens=self.num_tokens)

    def forget(self) -> None:
        """What was made of the weights, which are going to change."""
        self._native = None

    @torch.inference_mode()
    def logits(self, inputs: Inputs, context: int, num_rows: int, window: Window | None = None) -> Tensor:
        """Of the token that follows each input, [tokens, vocab]. All rows' tokens are among the first `context`.

        window: what each input attends to; None for all.
        """
        if self._runs_natively(len(inputs.token_ids)):
            return self._native_logits(inputs, context, num_rows, window)
        return self.logits_of_modules(inputs, context, num_rows, window)

    def _runs_natively(self, num_tokens: int) -> bool:
        if not self._is_served:
            return False
        most = MOST_NATIVE_TOKENS * (2 if self.model.config.hidden_size <= NARROW_HIDDEN else 1)
        return num_tokens <= most and torch.get_num_threads() == 1

    @torch.inference_mode()
    def logits_of_modules(self, inputs: Inputs, context: int, num_rows: int, window: Window | None = None) -> Tensor:
        """`logits` by the model's own modules."""
        if window is not None and window.width >= context:
            window = None
        self.cache.begin_decode(
            inputs.positions, context, num_rows, slots=inputs.slots, gathers=not self._is_native, window=window
        )
        lengths, slots = inputs.positions + 1, inputs.slots
        if window is not None:
            context, lengths, slots = window.width, lengths.clamp(max=window.width), None
        mask = decode_mask(lengths, context, self.model.dtype, native=self._is_native, slots=slots)
        output = self.model(
            input_ids=inputs.token_ids.unsqueeze(1),
            attention_mask=mask,
            position_ids=inputs.positions.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, 0, : self.num_tokens]
        return logits

    def _native_logits(self, inputs: Inputs, context: int, num_rows: int, window: Window | None) -> Tensor:
        if self._native is None:
            log_choice("decode", "native C++, a step in one call")
            self._native = NativeLlama(self.model, self.cache, self.num_tokens)
        return self._native.logits(inputs, context, num_rows, window)
