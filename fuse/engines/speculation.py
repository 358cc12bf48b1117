"""Speculative decoding: how many tokens to draft for each row, and what a draft proposes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fuse.engines.draft import Draft
from fuse.engines.rows import Rows


class DraftLengths(Protocol):
    """Decides how many tokens are drafted."""

    def choose(self, rows: Rows) -> Sequence[int]:
        """Tokens to draft for each row, if its response has room for them."""
        ...


class FixedLength:
    """As many for each row, always."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def choose(self, rows: Rows) -> Sequence[int]:
        return [self._num_tokens] * len(rows)


class Speculation:
    """A draft, and how far it drafts."""

    def __init__(self, draft: Draft, lengths: DraftLengths) -> None:
        self.draft = draft
        self._lengths = lengths

    def propose(self, rows: Rows, num_tokens: int) -> list[list[int]]:
        """What may follow each row's tokens: fewer tokens than its response may still get, for a step adds one more.

        num_tokens: that responses may consist of; a draft ends before any other.
        """
        counts = [min(count, row.num_left - 1) for count, row in zip(self._lengths.choose(rows), rows, strict=True)]
        if not any(counts):
            return [[] for _ in counts]
        drafts = self.draft.propose(rows, counts)
        return [
            draft[: next((i for i, token_id in enumerate(draft) if not 0 <= token_id < num_tokens), count)]
            for draft, count in zip(drafts, counts, strict=True)
        ]
