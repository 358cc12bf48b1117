"""The part of a sample's tokens that a draft attends to, where the target attends to all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """A row's first tokens and its last ones, the newest included; rows of no more tokens than both attend to all.

    first: a multiple of 8, by which native code reads.

    Source: Xiao et al., "Efficient streaming language models with attention sinks", ICLR 2024, section 3.2; as a draft
    over the target's own cache, Chen et al., "MagicDec", ICLR 2025. Deviation: positions are those in the text, since
    keys are cached with them, and not those in the window.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        assert self.first % 8 == 0, f"{self} cannot be read"
        assert self.last > 0, f"{self} leaves out the newest token"

    @property
    def width(self) -> int:
        """Tokens that are attended to, at most."""
        return self.first + self.last

    def places(self, lengths: Tensor) -> Tensor:
        """Where in their slots these tokens are, for rows of lengths int64 [rows]: int64 [rows, width].

        Those of shorter rows come in order, and go on beyond their ends.
        """
        place = torch.arange(self.width, device=lengths.device)
        left_out = (lengths - self.width).clamp(min=0).unsqueeze(1)
        return torch.where(place < self.first, place, place + left_out)
