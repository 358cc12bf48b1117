"""A draft without a model: what followed the same tokens before, in the prompt or in any response to it."""

from __future__ import annotations

from collections.abc import Sequence

from fuse.engines.draft import Expected
from fuse.engines.rows import Row, Rows
from fuse.ops.suffix_index import suffix_index

_MOST_TOKENS = 1 << 21
"""Of all prompts and responses that are remembered: about 130 MiB."""

EXPECTED = Expected(step_share=0.0, chance=0.4)
"""Looking a token up takes a microsecond; of text that repeats little, fewer are right."""


class NgramDraft:
    """Proposes what followed the longest part of a sample's end, in its text or that of its siblings.

    It remembers responses to the latest prompts, those of earlier weights included.
    """

    def __init__(self) -> None:
        self._index = suffix_index(_MOST_TOKENS)
        self._read: dict[int, tuple[int, int]] = {}  # by live sample: its number in the index, and its tokens there

    reads_window = False

    def prepare(self) -> None:
        """Nothing: texts are read as they come."""

    def propose(self, rows: Rows, counts: Sequence[int]) -> list[list[int]]:
        responses, added = zip(*map(self._unread, rows), strict=True)
        return self._index.extend(responses, added, counts)

    def release(self, row: Row) -> None:
        response, added = self._unread(row)
        self._index.extend([response], [added], [0])
        self._index.close(response)
        del self._read[row.request.sample_id]

    def forget(self) -> None:
        """Texts stay: they are no weights."""

    def _unread(self, row: Row) -> tuple[int, list[int]]:
        """A row's number in the index, and the tokens of its response that this is to be told."""
        sample_id = row.request.sample_id
        if sample_id not in self._read:
            self._read[sample_id] = self._index.open(row.request.prompt_ids), 0
        response, num_read = self._read[sample_id]
        self._read[sample_id] = response, len(row.response_ids)
        return response, row.response_ids[num_read:]
