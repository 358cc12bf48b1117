"""Whole sequences through a model at once, without a look at what tensors hold: that would have the host wait."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class NoCache(Cache):
    """A cache that keeps nothing, given to a model in place of None.

    Without a cache and without a mask, transformers reads positions to see whether several sequences are packed into a
    row (`masking_utils.find_packed_sequence_indices`), in every forward of every stage. Here none ever are.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """A layer's own keys and values are all there are."""
        return key_states, value_states
