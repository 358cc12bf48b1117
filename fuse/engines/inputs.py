"""What a forward over slots takes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
